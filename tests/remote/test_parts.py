"""The small parts by themselves: statuses, capabilities, budgets, single flight, watchdog, content."""

from __future__ import annotations

import threading
from pathlib import Path
from queue import Empty, SimpleQueue

import grpc
import pytest
from interrupts import interrupt_everywhere
from remote_data import BLAKE3, SHA256, named, noise

from snaploader import errors, workers
from snaploader._proto import remote_execution_pb2 as reapi, status_pb2
from snaploader.blobstore import Upload
from snaploader.context import Cancellation
from snaploader.errors import Cancelled, DataLoss, FailedPrecondition, Unimplemented
from snaploader.remote import calls, cas
from snaploader.remote.capabilities import MESSAGE_LIMIT_BYTES, negotiate, without_capabilities
from snaploader.remote.cas import ByteBudget, Share, run_all
from snaploader.remote.channel import Watchdog
from snaploader.remote.codec import Content
from snaploader.workers import Once, WorkerPool


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_has_a_typed_error(code: grpc.StatusCode) -> None:
    error = calls.from_message(status_pb2.Status(code=code.value[0], message="why"), "doing it")
    assert type(error) is not errors.SnaploaderError
    assert str(error) == f"doing it failed: why ({code.name})"
    assert calls.code_of(error) is code
    assert not calls.is_of_whole_call(error)


def test_unknown_status_numbers_are_internal() -> None:
    error = calls.from_message(status_pb2.Status(code=4711), "doing it")
    assert isinstance(error, errors.Internal)
    assert "no reason given" in str(error)


def test_long_details_are_shortened() -> None:
    assert len(str(calls.from_message(status_pb2.Status(code=5, message="x" * 10**6), "doing it"))) < 1100


@pytest.mark.parametrize(
    ("code", "message", "too_large"),
    [
        (8, "SERVER: Received message larger than max (5 vs. 4)", True),
        (8, "quota", False),
        (3, "anything", True),
        (11, "anything", True),
        (5, "larger than max", False),
    ],
)
def test_size_errors_are_told_apart(code: int, message: str, too_large: bool) -> None:
    error = calls.from_message(status_pb2.Status(code=code, message=message), "doing it")
    assert calls.is_too_large(error) is too_large
    assert error.transient is (message == "quota")


def test_undecodable_retry_info_is_ignored() -> None:
    message = status_pb2.Status(code=14)
    detail = message.details.add()
    detail.type_url = "type.googleapis.com/google.rpc.RetryInfo"
    for value in (b"", b"\x0a", b"\x0a\xff\xff", b"\x12\x01\x01", b"\x0a\x02\x08\x80"):
        detail.value = value
        assert calls.retry_after_s(calls.from_message(message, "doing it")) in (None, 0.0)


def server(*functions: int, **fields: object) -> reapi.ServerCapabilities:
    cache = reapi.CacheCapabilities(digest_functions=functions, **fields)  # type: ignore[arg-type]
    return reapi.ServerCapabilities(cache_capabilities=cache)


def test_negotiation_takes_the_best_known_function() -> None:
    sha, blake, md5 = (reapi.DigestFunction.SHA256, reapi.DigestFunction.BLAKE3, reapi.DigestFunction.MD5)
    assert negotiate(server(sha, blake), wanted=None, compression=True).digest_function is BLAKE3
    assert negotiate(server(sha, blake), wanted=SHA256, compression=True).digest_function is SHA256
    assert negotiate(server(), wanted=None, compression=True).digest_function is SHA256
    with pytest.raises(Unimplemented, match="neither"):
        negotiate(server(md5), wanted=None, compression=True)
    with pytest.raises(Unimplemented, match="it offers SHA256"):
        negotiate(server(sha), wanted=BLAKE3, compression=True)
    with pytest.raises(Unimplemented):
        without_capabilities(BLAKE3)


def test_batch_limit_is_the_servers_within_grpcs() -> None:
    for stated, expected in (
        (0, MESSAGE_LIMIT_BYTES),
        (1 << 30, MESSAGE_LIMIT_BYTES),
        (65536, 65536),
        (-1, MESSAGE_LIMIT_BYTES),
    ):
        capabilities = negotiate(server(max_batch_total_size_bytes=stated), wanted=None, compression=True)
        assert capabilities.message_limit_bytes == expected


def test_compression_is_used_only_where_offered_and_wanted() -> None:
    zstd = [reapi.Compressor.ZSTD]
    streams = server(supported_compressors=zstd)
    batches = server(supported_batch_update_compressors=zstd)
    for capabilities, compression, expected in (
        (streams, True, (True, False)),
        (batches, True, (False, True)),
        (streams, False, (False, False)),
        (batches, False, (False, False)),
    ):
        found = negotiate(capabilities, wanted=None, compression=compression)
        assert (found.zstd_streams, found.zstd_batch_updates) == expected


def test_server_that_is_no_cache_or_of_another_age_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="no cache"):
        negotiate(reapi.ServerCapabilities(), wanted=None, compression=True)
    for low, high in ((3, 3), (1, 1)):
        capabilities = server()
        capabilities.low_api_version.major, capabilities.high_api_version.major = low, high
        with pytest.raises(FailedPrecondition, match="version 2"):
            negotiate(capabilities, wanted=None, compression=True)


def test_budget_makes_wait_in_order_and_lets_a_giant_go_alone() -> None:
    budget = ByteBudget(100)
    small, big = Share(60), Share(1000)
    budget.acquire(small, Cancellation())
    order: list[str] = []
    waiting = threading.Event()

    def giant() -> None:
        waiting.set()
        budget.acquire(big, Cancellation())
        order.append("giant")
        budget.release(big)

    thread = threading.Thread(target=giant)
    thread.start()
    assert waiting.wait(300)
    assert budget.used_bytes == 60
    order.append("first")
    budget.release(small)
    thread.join(300)
    assert order == ["first", "giant"]
    assert budget.used_bytes == 0


def test_once_shares_one_making_and_forgets_failures() -> None:
    entered, go = threading.Event(), threading.Event()
    made: list[int] = []

    def make() -> int:
        made.append(1)
        entered.set()
        assert go.wait(300)
        if len(made) == 1:
            raise KeyError("first")
        return len(made)

    once = Once(make)
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            once.get()
        except KeyError as error:
            failures.append(error)

    first = threading.Thread(target=ask)
    first.start()
    assert entered.wait(300)
    second = threading.Thread(target=ask)
    second.start()
    go.set()
    first.join(300)
    second.join(300)
    assert once.get() == once.get()
    assert 1 <= len(failures) <= 2
    assert len(made) == 2


class FakeCall:
    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> bool:
        self.cancelled.set()
        return True


def test_watchdog_cancels_what_is_silent_and_only_that() -> None:
    dog = Watchdog(0.05)
    silent, paused = FakeCall(), FakeCall()
    with dog.watch(paused) as resting:
        resting.pause()
        with dog.watch(silent) as guard:
            assert silent.cancelled.wait(300)
            assert guard.expired
        assert not paused.cancelled.is_set()
        assert not resting.expired
    dog.close()
    with dog.watch(FakeCall()):
        pass  # starts no thread any more


def test_watchdog_that_never_watched_has_no_thread() -> None:
    before = threading.active_count()
    dog = Watchdog(1)
    assert threading.active_count() == before
    dog.close()


def test_content_is_checked_before_its_last_piece(tmp_path: Path) -> None:
    ((digest, data),) = named(noise(1000)).items()
    content = Content(Upload(digest, data[:-1] + b"\0" if data[-1:] != b"\0" else data[:-1] + b"\1"))
    given = bytearray()

    def drain() -> None:
        for piece in content.pieces(0, 300):
            given.extend(piece)

    with pytest.raises(DataLoss, match="nothing was stored"):
        drain()
    assert len(given) == 900


def test_content_can_be_read_again_from_anywhere(tmp_path: Path) -> None:
    ((digest, data),) = named(noise(1000)).items()
    path = tmp_path / "file"
    path.write_bytes(data)
    for source in (data, path):
        content = Content(Upload(digest, source))
        assert b"".join(content.pieces(0, 333)) == data
        assert content.read_bytes == 1000
        assert b"".join(content.pieces(500, 333)) == data[500:]
        rest = content.pieces(0, 400)
        next(rest)
        content.close()
        with pytest.raises(Cancelled):
            next(rest)


def test_a_transfer_that_gets_no_thread_says_which_limit_was_met(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    budget = ByteBudget(1 << 20)
    with WorkerPool(2) as pool:
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(errors.ResourceExhausted, match=r"ulimit -u.*pids\.max"):
            run_all([(1, lambda _: None)] * 2, pool, budget, Cancellation())
        monkeypatch.undo()
    assert budget.used_bytes == 0


class ImpatientQueue(SimpleQueue[None]):
    def get(self, block: bool = True, timeout: float | None = None) -> None:
        try:
            super().get(block, 20)
        except Empty:
            raise AssertionError("nobody woke this thread") from None


class ImpatientBudget(ByteBudget):
    """Fails instead of waiting for ever."""

    def acquire(self, share: Share, cancellation: Cancellation) -> None:
        share.wake = ImpatientQueue()
        super().acquire(share, cancellation)


def test_an_interrupt_at_any_step_of_a_bulk_transfer_leaves_nothing_to_wait_for() -> None:
    budget, parent = ImpatientBudget(64 * 1024), Cancellation()

    def work() -> None:
        ran: list[int] = []
        run_all(
            [(40_000, lambda _, number=number: ran.append(number)) for number in range(3)],
            pool,
            budget,
            parent,
        )
        assert sorted(ran) == [0, 1, 2]

    with WorkerPool(2) as pool:
        assert interrupt_everywhere(work, cas.__file__, workers.__file__) > 20
    assert budget.used_bytes == 0
