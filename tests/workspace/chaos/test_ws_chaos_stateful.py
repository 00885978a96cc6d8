"""Whatever is done to workspaces, fails or is killed: they are what a plain model says, and nothing is left.

`--hypothesis-profile=explore --timeout=0` tries other examples each time, and a hundred times as many.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
from chaos_faults import FaultyCatalog
from chaos_model import (
    DATA,
    DELETED,
    EVENTS,
    FULL,
    ON_HOST,
    PAUSED,
    RUNNING,
    STOPPED,
    Call,
    Model,
    RefusedError,
    Scopes,
    Tree,
    after,
    need,
)
from chaos_world import Place, World, fill, no_step, opened, tree_of
from chaos_zygote import Zygote, operate
from hypothesis import HealthCheck, event, note, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from snaploader.errors import FailedPrecondition, NotFound, ResourceExhausted, SnaploaderError, Unavailable
from snaploader.testing import EmbeddedServer, Fault
from snaploader.workspace.model import Scope, WorkspaceState
from snaploader.workspace.policy import Policy, ScopePolicy
from snaploader.workspace.testing import FakeRuntime

IDS = ("one", "two", "three")
POLICY = "policy"
NEEDED = {
    "resume": ON_HOST,
    "commit": (RUNNING, STOPPED, PAUSED),
    "touch": (RUNNING, STOPPED, PAUSED),
    "start": (STOPPED,),
    "stop": (RUNNING,),
}
"""States in which a call is possible; `resume` after a pause."""
RUNTIME_METHODS = ("stop", "capture", "continue_on", "start", "place", "remove", "create", "wait_ready")
ENDINGS = {"operation_failed", "operation_recovered"}
"""Events of operations that were taken back."""


class Steps:
    """Counts the steps of file cache and runtime; one of them may find that the disk is full."""

    def __init__(self) -> None:
        self.left = 0

    def __call__(self, step: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise ResourceExhausted(f"the disk is set to be full at {step}")


@dataclass(frozen=True)
class Environment:
    """What all examples share."""

    folder: Path
    catalog: str
    server: EmbeddedServer
    zygote: Zygote
    numbers: Iterator[int]


@dataclass(frozen=True)
class Mishap:
    """What goes wrong during a call."""

    kind: str
    """Where: "" (nowhere), "runtime", "catalog", "disk", "remote", "kill"."""
    at: int = 0
    times: int = 1
    is_after: bool = False
    method: str = ""
    second: Mishap | None = None
    """What goes wrong besides."""

    @property
    def all(self) -> tuple[Mishap, ...]:
        """It, and what goes wrong besides."""
        return (self,) if self.second is None else (self, self.second)

    def has(self, kind: str, method: str = "") -> bool:
        """Whether something of this kind is among them."""
        return any(each.kind == kind and method in {"", each.method} for each in self.all)


faults = st.one_of(
    st.builds(
        Mishap,
        st.just("runtime"),
        times=st.integers(1, 3),
        is_after=st.booleans(),
        method=st.sampled_from(RUNTIME_METHODS),
    ),
    st.builds(
        Mishap, st.just("catalog"), at=st.integers(0, 7), times=st.integers(1, 3), is_after=st.booleans()
    ),
    st.builds(Mishap, st.just("disk"), at=st.integers(1, 40)),
    st.builds(
        Mishap, st.just("remote"), at=st.integers(0, 8), times=st.integers(1, 4), is_after=st.booleans()
    ),
)
mishaps = st.one_of(
    st.just(Mishap("")),
    faults,
    st.builds(lambda first, second: replace(first, second=second), faults, faults),
    st.builds(Mishap, st.just("kill"), at=st.integers(1, 60) | st.integers(1, 400)),
)
scopes = st.sampled_from([FULL, DATA])
which = st.integers(0, len(IDS) - 1)
calls = st.one_of(
    st.builds(lambda scope: Call("create_snapshot", {"scope": scope}), scopes),
    st.just(Call("create_version")),
    st.builds(
        lambda number, keeps: Call("rollback", {"version": number, "keep_current": keeps}),
        st.integers(1, 4),
        st.booleans(),
    ),
    st.sampled_from(
        [Call(name) for name in ("pause", "resume", "pause", "resume", "commit", "start", "stop", "touch")]
    ),
)
changes = st.lists(
    st.tuples(
        st.sampled_from(["write", "folder", "link", "mode", "remove"]),
        st.sampled_from(["data/a", "data/b/c", "data/b", "rest", "etc/d"]),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=3,
)


class Machine(RuleBasedStateMachine):
    """One host and its workspaces, and what they should be."""

    def __init__(self, environment: Environment) -> None:
        super().__init__()
        number = next(environment.numbers)
        self.environment = environment
        self.prefix = f"ws{number}-"
        self.policy = f"{POLICY}-{number}"
        self.place = Place(
            str(environment.folder / str(number)),
            environment.catalog,
            environment.server.url,
            is_fake=True,
            host=f"host-{number}",
        )
        self.models: dict[str, Model] = {}
        self.scopes = Scopes()
        self.is_dirty = False
        """Whether something may be left for a recovery."""
        self.template = Path(self.place.folder, "template")
        self.template.mkdir(parents=True)
        fill(self.template, "template")
        self.stack = ExitStack()
        self.open()
        self.follow(self.scopes)

    # Opening and closing

    def open(self) -> None:
        self.steps = Steps()
        world = self.stack.enter_context(
            opened(self.place, self.steps, wrap=FaultyCatalog, manager_step=no_step)
        )
        self.world: World = world

    @property
    def runtime(self) -> FakeRuntime:
        return cast(FakeRuntime, self.world.runtime)

    @property
    def catalog(self) -> FaultyCatalog:
        return cast(FaultyCatalog, self.world.manager.catalog)

    def teardown(self) -> None:
        try:
            self.recover()
            for workspace_id, model in sorted(self.models.items()):
                if model.state != DELETED:
                    self.world.manager.delete(workspace_id)
            assert self.world.findings() == []
            self.check_nothing_is_left()
        finally:
            self.stack.close()
            shutil.rmtree(self.place.folder)

    def check_nothing_is_left(self) -> None:
        world = self.world
        world.manager.recover()
        assert world.cache.pins() == []
        assert world.runtime.workspaces() == []
        assert world.runtime.leftovers() == []
        assert world.manager.slots.owners() == {}
        assert world.manager.locks.ids() == []
        report = world.cache.verify()
        assert (report.bad_blobs, report.bad_refs, report.bad_pins) == ((), (), ()) or not any(
            (report.bad_blobs, report.bad_refs, report.bad_pins)
        )

    # Rules

    @initialize(has_source=st.booleans())
    def begin(self, has_source: bool) -> None:
        """There is a workspace with content and a version."""
        self.create(IDS[0], True, has_source, Mishap(""))
        self.write(0, [("write", "data/a", 1), ("write", "rest", 2), ("folder", "data/b", 0)])
        self.attempt(self.prefix + IDS[0], Call("create_version"), Mishap(""), by_recovery=False)

    @rule(name=st.sampled_from(IDS), start=st.booleans(), has_source=st.booleans(), mishap=mishaps)
    def create(self, name: str, start: bool, has_source: bool, mishap: Mishap) -> None:
        """Make a workspace, also where there is one already."""
        workspace_id = self.prefix + name
        options: dict[str, Any] = {"start": start, "policy": self.policy}
        if has_source:
            options["source"] = str(self.template)
        state = RUNNING if start else STOPPED
        content = loose(tree_of(self.template)) if has_source else None
        model = Model(state, content, content, events=(EVENTS["create"],))
        self.bear(workspace_id, model, Call("create", options), [workspace_id], mishap)

    @rule(name=st.sampled_from(IDS), origin=st.sampled_from(IDS), start=st.booleans(), mishap=mishaps)
    def fork(self, name: str, origin: str, start: bool, mishap: Mishap) -> None:
        """Fork a workspace from the latest commit of another, or of itself before it was deleted."""
        workspace_id, origin_id = self.prefix + name, self.prefix + origin
        commits = self.models[origin_id].commits if origin_id in self.models else ()
        model = None
        if commits:
            bare = Model("", None)
            content = bare.placed(commits[-1])
            base = content if commits[-1].scope == FULL else None
            state = RUNNING if start else STOPPED
            model = Model(state, content, base, events=(EVENTS["fork"],))
        self.bear(workspace_id, model, Call("fork", {"start": start}), [origin_id, workspace_id], mishap)

    @rule(which=which, changes=changes)
    def write(self, which: int, changes: list[tuple[str, str, int]]) -> None:
        """Change files as what runs in the workspace does."""
        workspace_id = self.pick(which)
        model = self.models[workspace_id]
        if model.state not in ON_HOST:
            return
        root = self.world.root(workspace_id)
        for kind, path, number in changes:
            change(root, kind, path, number)
        self.models[workspace_id] = replace(model, content=self.content(workspace_id))

    @rule(which=which, call=calls, mishap=mishaps, by_recovery=st.booleans())
    def operate(self, which: int, call: Call, mishap: Mishap, by_recovery: bool) -> None:
        """Do something to a workspace, whatever its state."""
        self.attempt(self.pick(which), call, mishap, by_recovery=by_recovery)

    @rule(which=which, call=calls, mishap=mishaps, by_recovery=st.booleans())
    def operate_when_possible(self, which: int, call: Call, mishap: Mishap, by_recovery: bool) -> None:
        """The same, after what makes it possible."""
        workspace_id = self.pick(which)
        state, needed = self.models[workspace_id].state, NEEDED.get(call.method, ON_HOST)
        first = {PAUSED: "resume", STOPPED: "start"}.get(state, "stop")
        if state != DELETED and state not in needed:
            self.attempt(workspace_id, Call(first), Mishap(""), by_recovery=False)
        if call.method == "resume":
            self.attempt(workspace_id, Call("pause"), Mishap(""), by_recovery=False)
        self.attempt(workspace_id, call, mishap, by_recovery=by_recovery)

    @rule(name=st.sampled_from(IDS), call=calls)
    def operate_undisturbed(self, name: str, call: Call) -> None:
        """Do something with nothing going wrong; the workspace need not be there, or not any more."""
        self.attempt(self.prefix + name, call, Mishap(""), by_recovery=False)

    @precondition(lambda self: len(self.alive()) > 1)
    @rule(which=which, mishap=mishaps, by_recovery=st.booleans())
    def delete(self, which: int, mishap: Mishap, by_recovery: bool) -> None:
        """Delete a workspace."""
        self.attempt(self.pick(which), Call("delete"), mishap, by_recovery=by_recovery)

    @rule(on_pause=scopes, on_commit=scopes)
    def follow_policy(self, on_pause: str, on_commit: str) -> None:
        """Change what snapshots hold."""
        if on_pause == FULL or on_commit == DATA:
            self.follow(Scopes(on_pause, on_commit))

    @rule()
    def reopen(self) -> None:
        """Go on in another process."""
        self.stack.close()
        self.stack = ExitStack()
        self.open()

    @rule()
    def evict(self) -> None:
        """Let go of everything in the file cache that is not pinned."""
        self.world.cache.prune()
        self.check_clean()

    @rule()
    def recover(self) -> None:
        """Put the host in order; nothing is wrong then, and a second recovery finds nothing to do."""
        summary = self.world.manager.recover()
        assert summary.problems == ()
        assert summary.busy == ()
        self.adopt_restarts()
        self.check_all()
        self.is_dirty = False
        assert self.world.findings() == []
        again = self.world.manager.recover()
        assert (again.repaired, again.problems, again.adopted) == ((), (), ())

    # How

    def alive(self) -> list[str]:
        return [each for each, model in sorted(self.models.items()) if model.state != DELETED]

    def pick(self, which: int) -> str:
        """One of the workspaces that live."""
        alive = self.alive()
        return alive[which % len(alive)]

    def follow(self, scopes: Scopes) -> None:
        policy = Policy(self.policy, ScopePolicy(Scope(scopes.on_pause), Scope(scopes.on_commit)))
        with self.world.catalog.transaction() as tx:
            tx.put_policy(policy)
        self.scopes = scopes

    def bear(
        self, workspace_id: str, model: Model | None, call: Call, arguments: list[str], mishap: Mishap
    ) -> None:
        """Make a workspace; None: that is not possible, as where there was one of that id before."""
        is_refused = model is None or workspace_id in self.models
        before = {name: self.shown(name) for name in self.models}
        error, was_killed = self.act(call, arguments, mishap)
        if is_refused:
            assert was_killed or error is not None
            self.settle_births(mishap)
            assert {name: self.shown(name) for name in self.models} == before
            return
        assert model is not None
        if not mishap.kind:
            assert error is None, repr(error)
        if error is not None or was_killed:
            self.settle_births(mishap)
            try:
                self.world.manager.workspace(workspace_id)
            except NotFound:
                assert not self.world.runtime.status(workspace_id).exists
                return
        else:
            self.is_dirty |= bool(mishap.kind)
        self.models[workspace_id] = replace(model, content=model.content or self.content(workspace_id))
        self.check(workspace_id)
        self.check_clean()

    def settle_births(self, mishap: Mishap) -> None:
        """What was half made is invisible, and gone after a recovery."""
        if mishap.kind:
            self.recover()

    def attempt(self, workspace_id: str, call: Call, mishap: Mishap, *, by_recovery: bool) -> None:
        """Call the manager, and see that the workspace is as before or as after it."""
        model = self.models.get(workspace_id)
        try:
            need(model is not None)
            assert model is not None
            wanted = after(model, call, self.scopes)
        except RefusedError:
            error, was_killed = self.act(call, [workspace_id], mishap)
            assert was_killed or error is not None
            if not mishap.kind:
                assert isinstance(error, FailedPrecondition | NotFound), repr(error)
            self.settle(workspace_id, mishap, by_recovery=by_recovery)
            if model is not None:
                self.adopt(workspace_id, model, model, mishap, call=call.method, is_settled=True)
            return
        error, was_killed = self.act(call, [workspace_id], mishap)
        if not mishap.kind:
            assert error is None, repr(error)
        is_left = error is not None or was_killed
        if is_left:
            self.settle(workspace_id, mishap, by_recovery=by_recovery)
        elif mishap.kind:
            self.is_dirty = True
        self.adopt(
            workspace_id,
            model,
            wanted,
            mishap,
            call=call.method,
            is_settled=is_left,
            has_raised=error is not None,
            must_be_done=not is_left,
        )
        self.check_clean()

    def act(self, call: Call, arguments: list[str], mishap: Mishap) -> tuple[SnaploaderError | None, bool]:
        """Call the manager while something goes wrong; what it raised, and whether that is not known."""
        note(f"{call} {mishap}")
        options = dict(call.options)
        if mishap.kind == "kill":
            self.environment.zygote.kill_at(mishap.at, self.place, call.method, arguments, options)
            return None, True
        for each in mishap.all:
            self.arrange(each)
        try:
            operate(self.world, call.method, arguments, options)
        except SnaploaderError as error:
            note(f"raised {error!r} {getattr(error, '__notes__', '')}")
            return error, False
        finally:
            self.environment.server.faults.clear()
            self.catalog.disarm()
            self.steps.left = 0
            self.runtime._failures.clear()
        return None, False

    def arrange(self, mishap: Mishap) -> None:
        """Let something go wrong."""
        if mishap.kind == "runtime":
            failure = Unavailable(f"{mishap.method} is set to fail")
            self.runtime.fail_next(mishap.method, failure, times=mishap.times, after_effect=mishap.is_after)
        elif mishap.kind == "catalog":
            self.catalog.arm(mishap.at, mishap.times, is_after=mishap.is_after)
        elif mishap.kind == "disk":
            self.steps.left = mishap.at
        elif mishap.kind == "remote":
            fault = Fault(status="UNAVAILABLE", after=mishap.at, times=mishap.times)
            self.environment.server.faults.add(replace(fault, lose_reply=mishap.is_after))

    def settle(self, workspace_id: str, mishap: Mishap, *, by_recovery: bool) -> None:
        """Finish what was left, by a recovery or as the next operation on the workspace does."""
        self.is_dirty |= bool(mishap.kind)
        if not mishap.kind:
            return
        if by_recovery:
            summary = self.world.manager.recover()
            assert (summary.problems, summary.busy) == ((), ())
            self.is_dirty = False
            return
        model = self.models.get(workspace_id)
        if model is None:
            return
        with suppress(FailedPrecondition), self.world.manager.hold(workspace_id) as held:
            held.settle()

    def adopt(
        self,
        workspace_id: str,
        before: Model,
        wanted: Model,
        mishap: Mishap,
        *,
        call: str,
        is_settled: bool,
        has_raised: bool = False,
        must_be_done: bool = False,
    ) -> None:
        """See which of the two the workspace is, and go on with that."""
        events = self.world.events(workspace_id)
        known = len(before.events)
        assert tuple(events[:known]) == before.events, "an event was lost"
        tail = events[known:]
        done = list(wanted.events[known:])
        ends = [each for each in tail if each in ENDINGS]
        is_start_hit = mishap.has("runtime", "start")
        is_done = bool(done) and done[0] in tail
        if wanted is before:
            is_done = False
        event(f"{call} {'/'.join(each.kind for each in mishap.all)}: {'done' if is_done else 'not done'}")
        if is_done and has_raised:
            assert call == "rollback" or mishap.has("catalog"), "it raised, and was done"
        if must_be_done and done:
            assert is_done, "it returned, and was not done"
        allowed = [done] if is_done else [[], *([ending] for ending in ENDINGS)]
        extra = [each for each in tail if each in {"workspace_start", "workspace_stop"}]
        if is_start_hit and is_settled and tail not in allowed:
            # The workspace could not be started again, until the recovery.
            tail = [each for each in tail if each not in extra or [each] == done]
        assert tail in allowed, (tail, allowed)
        assert len(ends) <= (0 if is_done else 1)
        model = wanted if is_done or not done else before
        if must_be_done:
            model = wanted
        state = self.world.manager.workspace(workspace_id).state.value
        if state != model.state and is_start_hit:
            assert state in {STOPPED, RUNNING}
            model = replace(model, state=state)
        self.models[workspace_id] = replace(model, events=tuple(events))
        self.check(workspace_id)

    def adopt_restarts(self) -> None:
        """A recovery may have started what could not be started before, or could not either."""
        for workspace_id, model in self.models.items():
            events = tuple(self.world.events(workspace_id))
            state = self.world.manager.workspace(workspace_id).state.value
            tail = events[len(model.events) :]
            assert set(tail) <= {"workspace_start", "workspace_stop"}, tail
            assert not tail or self.is_dirty
            self.models[workspace_id] = replace(model, events=events, state=state if tail else model.state)

    # Comparing

    def shown(self, workspace_id: str) -> tuple[Any, ...]:
        manager = self.world.manager
        workspace = manager.workspace(workspace_id)
        return (
            workspace.state,
            workspace.last_version,
            self.world.events(workspace_id),
            self.content(workspace_id) if workspace.state.value in ON_HOST else None,
        )

    def content(self, workspace_id: str) -> Tree:
        return loose(tree_of(self.world.root(workspace_id)))

    def check_all(self) -> None:
        for workspace_id in self.models:
            self.check(workspace_id)

    def check_clean(self) -> None:
        if not self.is_dirty:
            assert self.world.findings() == []

    def check(self, workspace_id: str) -> None:
        """The workspace is what the model says."""
        manager, model = self.world.manager, self.models[workspace_id]
        workspace = manager.workspace(workspace_id)
        assert workspace.state.value == model.state
        assert workspace.operation is None
        assert tuple(self.world.events(workspace_id)) == model.events
        numbers = [version.number for version in manager.list_versions(workspace_id)]
        assert numbers == list(range(1, len(model.versions) + 1))
        status = self.world.runtime.status(workspace_id)
        assert status.is_running == (model.state == RUNNING)
        if model.state in ON_HOST:
            assert self.content(workspace_id) == model.content
        with self.world.catalog.reading() as reader:
            kinds = [record.kind.value for record in reader.snapshots(workspace_id)]
        assert kinds.count("commit") == len(model.commits)
        assert kinds.count("version") == len(model.versions)
        assert kinds.count("pause") <= 1
        if workspace.state is WorkspaceState.PAUSED:
            assert kinds.count("pause") == 1
            assert model.state == PAUSED
            assert not status.exists or self.is_dirty


def loose(tree: Tree) -> Tree:
    """Without the time of the root, in which the durable directory is made anew."""
    return {name: [*entry[:2], 0, *entry[3:]] if name == "." else entry for name, entry in tree.items()}


def change(root: Path, kind: str, path: str, number: int) -> None:
    """Change one path, if that can be done."""
    target = root / path
    if any(parent.is_symlink() or parent.is_file() for parent in target.parents if parent != root):
        return
    if not target.parent.is_dir():
        target.parent.mkdir(parents=True)
    if kind == "mode":
        if target.exists() and not target.is_symlink():
            target.chmod((0o755, 0o700, 0o644 | 0o100, 0o777)[number])
        return
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)
    if kind == "write":
        target.write_bytes(bytes([number]) * (1, 100, 5000, 70_000)[number])
    elif kind == "folder":
        target.mkdir()
    elif kind == "link":
        target.symlink_to(("a", "../nowhere", "/", "b/c")[number])
    os.utime(root)


def bounded() -> settings:
    """Few examples in each run of the tests, and as many as the profile says when it is to explore."""
    is_repeatable = settings.default is not None and settings.default.derandomize
    return settings(
        max_examples=10 if is_repeatable else settings().max_examples,
        stateful_step_count=20 if is_repeatable else 40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@pytest.mark.slow
def test_workspaces_are_what_a_plain_model_says_whatever_goes_wrong(tmp_path: Path, catalog_url: str) -> None:
    with EmbeddedServer() as server, Zygote() as zygote:
        environment = Environment(tmp_path, catalog_url, server, zygote, itertools.count())
        run_state_machine_as_test(lambda: Machine(environment), settings=bounded())
