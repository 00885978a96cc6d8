"""Observers are told of everything, together or one alone; without one, nobody is told."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import pytest
from telemetry_hosts import CHUNK, TASK, MakeHost

from snaploader import DataLoss, NotFound, Observer, Observers, Operation, ReadSources, SnaploaderError
from snaploader.files import OddEntry
from snaploader.loader.manifests import Deleted
from snaploader.telemetry import NOBODY, UNWATCHED, outcome


class EmbeddersOwn(SnaploaderError):
    """An error of somebody else's store."""


CONTENT = b"a" * CHUNK + b"b" * 100


class Recorded(Operation):
    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder = recorder
        self.name = name

    def headers(self) -> tuple[tuple[str, str], ...]:
        return ((f"x-{self.recorder.name}", self.name),)

    def set(self, **attributes: object) -> None:
        self.recorder.log.append((self.name, "set", tuple(attributes)))

    def __enter__(self) -> Self:
        self.recorder.log.append((self.name, "enter"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.recorder.log.append((self.name, "exit", outcome(error)))


class Recorder(Observer):
    """Writes down what it is told."""

    def __init__(self, name: str = "recorder") -> None:
        self.name = name
        self.log: list[tuple[object, ...]] = []
        self.parts: list[object] = []
        self.ended: list[object] = []

    def operation(self, name: str, /, **attributes: object) -> Operation:
        return Recorded(self, name)

    def event(self, name: str, /, **attributes: object) -> None:
        self.log.append((name, "event"))

    def watch(self, part: object, /) -> Callable[[], None]:
        self.parts.append(type(part).__name__)
        return lambda: self.ended.append(type(part).__name__)


def test_every_operation_that_begins_ends(make_host: MakeHost) -> None:
    recorder = Recorder()
    host = make_host("a", recorder)
    with pytest.raises(NotFound):
        host.find()
    host.save(CONTENT)
    begun = sorted(str(name) for name, what, *_ in recorder.log if what == "enter")
    ended = sorted(str(name) for name, what, *_ in recorder.log if what == "exit")
    assert begun == ended
    assert {"loader.cache_snapshot", "save.store", "save.upload", "lookup", "rpc"} <= set(begun)


def test_parts_are_watched_until_they_are_closed(make_host: MakeHost) -> None:
    recorder = Recorder()
    host = make_host("a", recorder)
    host.save(CONTENT)
    with host.loader.unpack_snapshot(host.find(), host.folder / "out"):
        assert recorder.parts == ["FileCache", "RemoteCache", "UnpackedSnapshot"]
        assert recorder.ended == []
    assert recorder.ended == ["UnpackedSnapshot"]
    host.loader.close()
    host.remote.close()
    host.cache.close()
    assert recorder.ended == ["UnpackedSnapshot", "RemoteCache", "FileCache"]


def test_several_observers_are_told_the_same() -> None:
    first, second = Recorder("a"), Recorder("b")
    both = Observers(first, Observer(), second)
    with both.operation("lookup") as operation:
        operation.set(key="k")
        assert operation.headers() == (("x-a", "lookup"), ("x-b", "lookup"))
    both.event("retry")
    both.watch(object())()
    told = [("lookup", "enter"), ("lookup", "set", ("key",)), ("lookup", "exit", "ok"), ("retry", "event")]
    assert first.log == second.log == told
    assert first.ended == second.ended == ["object"]


def test_one_that_watches_is_not_wrapped() -> None:
    recorder = Recorder()
    assert isinstance(Observers(Observer(), recorder).operation("lookup"), Recorded)
    assert Observers(Observer()).operation("lookup") is UNWATCHED


def test_nobody_costs_no_object() -> None:
    assert NOBODY.operation("lookup", key="k") is UNWATCHED
    assert UNWATCHED.headers() == ()


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (None, "ok"),
        (NotFound("x"), "not_found"),
        (DataLoss("x"), "data_loss"),
        (Deleted("x"), "not_found"),
        (OddEntry("x"), "failed_precondition"),
        (EmbeddersOwn("x"), "unknown"),
        (ValueError(), "unknown"),
        (KeyboardInterrupt(), "cancelled"),
    ],
)
def test_outcomes_are_words(error: BaseException | None, word: str) -> None:
    assert outcome(error) == word


@pytest.mark.parametrize("local_chunks", [True, False])
def test_only_readers_stall(make_host: MakeHost, local_chunks: bool) -> None:
    make_host("a").save(CONTENT)
    recorder = Recorder()
    host = make_host("b", recorder)
    key_set = host.loader.snapshot_key_set(TASK, "conf")
    snapshot = host.loader.get_snapshot(key_set, sources=ReadSources(local_chunks=local_chunks))
    stall = ("stall", "enter")
    assert stall not in recorder.log  # what the manifest names is read, and nobody waits for a chunk
    with host.loader.read_snapshot(snapshot) as reader:
        reader.read_at("disk", 0, 10)
        assert recorder.log.count(stall) == 1
        reader.read_at("disk", 10, 10)  # it is at hand
        assert recorder.log.count(stall) == 1
    with host.loader.unpack_snapshot(snapshot, host.folder / "out") as unpacked:
        unpacked.chunked_files["disk"].read_at(CHUNK, 10)
    assert recorder.log.count(stall) == 2
    assert recorder.log.count(("stall", "exit", "ok")) == 2


class Attributes(Observer):
    """Writes down what is told of the calls of a loader."""

    def __init__(self) -> None:
        self.told: dict[str, dict[str, object]] = {}

    def operation(self, name: str, /, **attributes: object) -> Operation:
        self.told[name] = attributes
        return Told(attributes)


class Told(Operation):
    def __init__(self, attributes: dict[str, object]) -> None:
        self.attributes = attributes

    def set(self, **attributes: object) -> None:
        self.attributes.update(attributes)


def test_a_call_tells_what_it_is_about_however_its_arguments_are_given(make_host: MakeHost) -> None:
    observer = Attributes()
    host = make_host("a", observer)
    key_set = host.loader.snapshot_key_set(configuration_hash="conf", task=TASK)
    assert observer.told["loader.snapshot_key_set"]["task_id"] == TASK.task_id
    host.loader.invalidate_snapshot(key=key_set.write_key)
    assert observer.told["loader.invalidate_snapshot"] == {"key": key_set.write_key}
    host.save(CONTENT, snapshot_id="one", task=TASK)
    told = observer.told["loader.cache_snapshot"]
    assert (told["snapshot_id"], told["task_id"]) == ("one", TASK.task_id)
    snapshot = host.loader.get_snapshot_by_id("one")
    host.loader.restore_snapshot(output_directory=host.folder / "whole", snapshot=snapshot)
    assert observer.told["loader.restore_snapshot"]["snapshot_id"] == "one"
    host.loader.delete_snapshot("one")
    assert observer.told["loader.delete_snapshot"]["snapshot_id"] == "one"
