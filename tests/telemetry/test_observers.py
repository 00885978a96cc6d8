"""Observers are told of everything, together or one alone; without one, nobody is told."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import pytest
from telemetry_hosts import CHUNK, MakeHost

from snaploader import DataLoss, NotFound, Observer, Observers, Operation
from snaploader.telemetry import NOBODY, UNWATCHED, outcome

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
        (ValueError(), "unknown"),
        (KeyboardInterrupt(), "cancelled"),
    ],
)
def test_outcomes_are_words(error: BaseException | None, word: str) -> None:
    assert outcome(error) == word
