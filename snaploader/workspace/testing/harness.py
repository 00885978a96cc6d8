"""What a check of a runtime is, and what checks have in common."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from cow import COWStore
from snaploader._proto import snaploader_pb2
from snaploader.errors import NotFound
from snaploader.keys import SnapshotKey
from snaploader.loader import Snapshot, SnapshotLoader
from snaploader.workspace.model import Scope, Volume, WorkspaceSpec
from snaploader.workspace.runtime.protocol import Runtime

VOLUMES = (Volume("data", "/srv/data"), Volume("logs", "/var/log/app"))
"""Of the workspaces that the checks make."""
CHUNK = 64 << 10
"""Chunk size of the stores that the checks make, in bytes."""


class Harness(Protocol):
    """A runtime to check, and what the checks need beside it."""

    runtime: Runtime
    loader: SnapshotLoader
    command: tuple[str, ...]
    """Runs until it is asked to end."""
    scratch: str
    """A folder that the checks may write to."""

    def another(self) -> Runtime:
        """Return a runtime on the same state, as another process would have; the check closes it."""
        ...

    def write(self, workspace_id: str, path: str, data: bytes) -> None:
        """Write a file of a workspace, at an absolute path as the workspace sees it; folders are made."""
        ...

    def read(self, workspace_id: str, path: str) -> bytes | None:
        """Return what a file of a workspace holds, or None when there is none."""
        ...


@dataclass(frozen=True, slots=True)
class RuntimeCheck:
    """One thing that a runtime must do."""

    name: str
    """As in "stopping_twice_is_harmless"."""
    description: str
    function: Callable[[Harness], None]

    def __call__(self, harness: Harness) -> None:
        """Check it. AssertionError when the runtime does not do it."""
        self.function(harness)

    def __str__(self) -> str:
        return self.name


class Suite:
    """Collects checks in the order they are written."""

    def __init__(self) -> None:
        self.checks: list[RuntimeCheck] = []

    def __call__(self, function: Callable[[Harness], None]) -> Callable[[Harness], None]:
        """Decorator: the function is a check, named and described by its name and docstring."""
        self.checks.append(RuntimeCheck(function.__name__, (function.__doc__ or "").strip(), function))
        return function


class LoaderWithoutContent:
    """In place of a loader: whatever it is asked for is gone from every cache."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A method that raises NotFound."""

        def fail(*_: Any, **__: Any) -> Any:
            raise NotFound(f"{name}: this content is gone from every cache")

        return fail


def new_id() -> str:
    """Return an id that no workspace has."""
    return f"check-{uuid.uuid4().hex[:12]}"


def new_spec(
    harness: Harness, *, command: tuple[str, ...] | None = None, volumes: tuple[Volume, ...] = VOLUMES
) -> WorkspaceSpec:
    """Return the spec of a workspace that does not exist yet."""
    command = harness.command if command is None else command
    return WorkspaceSpec(new_id(), command=command, volumes=volumes)


@contextmanager
def workspace(
    harness: Harness, *, command: tuple[str, ...] | None = None, volumes: tuple[Volume, ...] = VOLUMES
) -> Iterator[WorkspaceSpec]:
    """Give a new workspace, which is removed at the end."""
    spec = new_spec(harness, command=command, volumes=volumes)
    harness.runtime.create(spec)
    try:
        yield spec
    finally:
        harness.runtime.stop(spec.workspace_id, timeout_s=0)
        harness.runtime.remove(spec.workspace_id)


@contextmanager
def new_store(harness: Harness, size: int) -> Iterator[COWStore]:
    """Give a new store, which is closed at the end."""
    with COWStore(f"{harness.scratch}/{uuid.uuid4().hex}", size=size, chunk_size=CHUNK) as store:
        yield store


def capture(harness: Harness, spec: WorkspaceSpec, scope: Scope) -> Snapshot:
    """Capture a workspace, save it locally and find it."""
    key = SnapshotKey(instance_name="runtime-checks")
    with harness.runtime.capture(spec, scope) as captured:
        saved = harness.loader.cache_snapshot(
            key,
            files=captured.files,
            chunked_files=captured.chunked_files,
            directories=captured.directories,
            vm_configuration=snaploader_pb2.VMConfiguration(),
            remote=False,
        )
    return harness.loader.get_snapshot_by_id(
        saved.snapshot_id, instance_name=key.instance_name, read_policy="local-only"
    )


def place(
    harness: Harness,
    spec: WorkspaceSpec,
    snapshot: Snapshot,
    token: str,
    base: Snapshot | None = None,
    *,
    loader: Any = None,
) -> None:
    """Place a snapshot, with the harness's loader unless another is given."""
    loader = harness.loader if loader is None else loader
    harness.runtime.place(spec, loader, snapshot, base=base, token=token)


def write(harness: Harness, spec: WorkspaceSpec, files: Mapping[str, bytes]) -> None:
    """Write files by their paths."""
    for path, data in files.items():
        harness.write(spec.workspace_id, path, data)


def require_content(harness: Harness, spec: WorkspaceSpec, files: Mapping[str, bytes | None]) -> None:
    """Raise AssertionError unless files hold what is given; None is for what must not be there."""
    for path, expected in files.items():
        found = harness.read(spec.workspace_id, path)
        require(found == expected, f"{path} holds {found!r} instead of {expected!r}")


def require(is_met: bool, message: str) -> None:
    """Raise AssertionError with this message unless the condition is met."""
    if not is_met:
        raise AssertionError(message)


def require_error(kind: type[BaseException], call: Callable[[], object]) -> None:
    """Raise AssertionError unless the call raises that error."""
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was expected and nothing was raised")
