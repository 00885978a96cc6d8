"""Whatever the server does, a load returns exactly the right bytes or raises a typed error, in time."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from loader_hosts import CHUNK, Host, HostFactory, image

from snaploader.errors import DataLoss, DeadlineExceeded, NotFound, SnaploaderError
from snaploader.remote import RetryPolicy, Timeouts
from snaploader.testing import CallGate, EmbeddedServer, Fault, FaultScript, ServerOptions

RETRY = RetryPolicy(attempts=3, initial_delay_s=0.001, max_delay_s=0.01, budget_s=5)
TIMEOUTS = {
    "hang": Timeouts(call_s=0.3, idle_s=0.3),
    "hang once": Timeouts(call_s=1, idle_s=1),
}
"""Short for calls that hang; others may take as long as a busy machine makes them."""
LOAD_METHODS = ("GetCapabilities", "GetActionResult", "FindMissingBlobs", "BatchReadBlobs", "Read")
SAVE_METHODS = ("FindMissingBlobs", "BatchUpdateBlobs", "Write", "UpdateActionResult", "GetActionResult")

FAULTS = {
    "unavailable twice": {"status": "UNAVAILABLE", "times": 2},
    "unavailable": {"status": "UNAVAILABLE", "times": None},
    "internal once": {"status": "INTERNAL", "times": 1},
    "permission denied": {"status": "PERMISSION_DENIED", "times": None},
    "unauthenticated": {"status": "UNAUTHENTICATED", "times": None},
    "unimplemented": {"status": "UNIMPLEMENTED", "times": None},
    "data loss": {"status": "DATA_LOSS", "times": None},
    "resource exhausted once": {"status": "RESOURCE_EXHAUSTED", "times": 1},
    "reply lost once": {"lose_reply": True, "times": 1},
    "stream cut": {"cut_after_bytes": 1000, "times": 2},
    "stream ends early": {"truncate_after_bytes": 1000, "times": None},
    "bit flipped once": {"flip_bit": 12345, "times": 1},
    "bit flipped": {"flip_bit": 12345, "times": None},
    "blob dropped": {"drop_blob": True, "times": None},
    "wrong digest": {"wrong_digest": True, "times": None},
    "item unavailable twice": {"item_status": "UNAVAILABLE", "times": 2},
    "item not found": {"item_status": "NOT_FOUND", "times": None},
    "latency": {"latency_s": 0.02, "times": 3},
    "hang": {"hang": True, "times": None},
    "hang once": {"hang": True, "times": 1},
    "slow": {"bandwidth_bytes_per_s": 4e6, "times": None},
}
MUST_WORK = {
    "unavailable twice",
    "internal once",
    "resource exhausted once",
    "reply lost once",
    "stream cut",
    "bit flipped once",
    "item unavailable twice",
    "latency",
    "hang once",
    "slow",
}
CONTENT_METHODS = ("BatchReadBlobs", "Read", "BatchUpdateBlobs", "Write")
BIG = bytes(range(1, 252)) * 12_000
"""A plain file that is too big for a batch, so that it is streamed."""


def must_work(fault: str, method: str) -> bool:
    """Whether the client can sit the fault out. It cannot know that an answer without a digest is wrong."""
    return fault in MUST_WORK and (fault != "bit flipped once" or method in CONTENT_METHODS)


def applies(fault: str, method: str) -> bool:
    """Whether a fault can happen to a method at all."""
    if fault.startswith("stream"):
        return method in ("Read", "Write") and not (fault == "stream ends early" and method == "Write")
    if fault.startswith("item"):
        return method in ("BatchReadBlobs", "BatchUpdateBlobs")
    if fault == "wrong digest":
        return method in ("BatchReadBlobs", "BatchUpdateBlobs", "FindMissingBlobs")
    if fault == "blob dropped":
        return method not in ("GetCapabilities", "GetActionResult", "UpdateActionResult")
    return True


def cases(methods: tuple[str, ...]) -> list[Any]:
    """Every method with every fault; those that hang take as long as their deadlines."""
    slow = {fault: [pytest.mark.slow] for fault in TIMEOUTS}
    return [
        pytest.param(method, fault, marks=slow.get(fault, []))
        for method in methods
        for fault in FAULTS
        if applies(fault, method)
    ]


def save_with_plain_file(host: Host, content: bytes) -> None:
    disk, big = host.folder / "disk.img", host.folder / "big.bin"
    disk.write_bytes(content)
    big.write_bytes(BIG)
    host.save(files={"big": big}, chunked_files={"disk": disk})


def load_all(host: Host) -> tuple[bytes, bytes]:
    with host.unpack(host.find()) as unpacked:
        disk = unpacked.chunked_files["disk"]
        return disk.read_at(0, disk.size), unpacked.files["big"].read_bytes()


@pytest.mark.parametrize(("method", "fault"), cases(LOAD_METHODS))
def test_a_load_is_right_or_a_typed_error(make_host: HostFactory, method: str, fault: str) -> None:
    faults = FaultScript()
    content = image(1)
    with EmbeddedServer(faults=faults) as server:
        save_with_plain_file(make_host("a", server), content)
        faults.add(Fault(method, **FAULTS[fault]))
        host = make_host("b", server, retry=RETRY, timeouts=TIMEOUTS.get(fault, Timeouts()))
        start = time.monotonic()
        try:
            loaded = load_all(host)
        except SnaploaderError:
            assert not must_work(fault, method)
        else:
            assert loaded == (content, BIG)
        # Without deadlines it would last for ever; with them, seconds, on a busy machine a minute.
        assert time.monotonic() - start < 300
        faults.clear()
        # A server that has no capabilities to tell is taken for one that speaks SHA-256 only.
        if fault != "blob dropped" and (method, fault) != ("GetCapabilities", "unimplemented"):
            assert load_all(host) == (content, BIG)


@pytest.mark.parametrize(("method", "fault"), cases(SAVE_METHODS))
def test_a_save_is_whole_or_a_typed_error(make_host: HostFactory, method: str, fault: str) -> None:
    faults = FaultScript()
    content = image(2)
    with EmbeddedServer(faults=faults) as server:
        host = make_host("a", server, retry=RETRY, timeouts=TIMEOUTS.get(fault, Timeouts()))
        host.keys()
        faults.add(Fault(method, **FAULTS[fault]))
        try:
            save_with_plain_file(host, content)
        except SnaploaderError:
            assert not must_work(fault, method)
        faults.clear()
        reader = make_host("b", server)
        try:
            loaded = load_all(reader)
        except NotFound:
            # Whatever the save ended with, a reader finds the whole snapshot or none.
            assert not must_work(fault, method)
        else:
            assert loaded == (content, BIG)
        host.loader.get_snapshot(host.keys(), "local-only") if must_work(fault, method) else None


def test_a_big_plain_file_that_was_damaged_on_the_way_is_fetched_again(
    make_host: HostFactory, tmp_path: Path
) -> None:
    faults = FaultScript()
    big = os.urandom(3 << 20)
    (tmp_path / "big").write_bytes(big)
    with EmbeddedServer(options=ServerOptions(zstd_streams=False), faults=faults) as server:
        make_host("a", server).save(files={"big": tmp_path / "big"})
        faults.add(Fault("Read", flip_bit=12345))
        host = make_host("b", server)
        with host.unpack(host.find()) as unpacked:
            assert unpacked.files["big"].read_bytes() == big
        assert not faults.pending


def test_local_bit_rot_is_repaired_from_remote(make_host: HostFactory, server: EmbeddedServer) -> None:
    make_host("a", server).save(image(3))
    host = make_host("a", server)
    for path in host.chunk_files():
        flip_a_bit(path)
    assert make_host("a", server).load() == image(3)
    assert make_host("a", server).load(policy="local-only") == image(3)


def test_bit_rot_on_every_tier_is_data_loss(make_host: HostFactory, server: EmbeddedServer) -> None:
    make_host("a", server).save(image(4))
    host = make_host("a", server)
    digest = host.find().tables["disk"].get(0)
    for path in host.chunk_files():
        flip_a_bit(path)
    server.corrupt_blob(digest)
    host = make_host("a", server)
    with host.unpack(host.find()) as unpacked, pytest.raises(DataLoss, match=digest.hash):
        unpacked.chunked_files["disk"].read_at(0, 1)


def test_a_chunk_lost_after_the_lookup_is_a_typed_error(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    make_host("a", server).save(image(5))
    host = make_host("b", server)
    with host.unpack(host.find()) as unpacked:
        server.delete_blob(unpacked.snapshot.tables["disk"].get(4))
        disk = unpacked.chunked_files["disk"]
        with pytest.raises(NotFound) as caught:
            disk.read_at(4 * CHUNK, 1)
        assert any("chunk 4 of 'disk'" in note for note in caught.value.__notes__)
        assert disk.read_at(5 * CHUNK, 1) == image(5)[5 * CHUNK : 5 * CHUNK + 1]


def test_many_readers_share_one_fetch(make_host: HostFactory) -> None:
    gate = CallGate()
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        make_host("a", server).save(image(6))
        host = make_host("b", server)
        snapshot = host.find()
        before = server.calls("BatchReadBlobs") + server.calls("Read")
        faults.add(Fault("BatchReadBlobs", gate=gate), Fault("Read", gate=gate))
        with host.unpack(snapshot) as one, host.unpack(snapshot) as two:
            results: list[bytes] = []
            threads = [
                threading.Thread(target=lambda u=u: results.append(u.chunked_files["disk"].read_at(0, 9)))
                for u in (one, two) * 8
            ]
            for thread in threads:
                thread.start()
            assert gate.wait_reached(10)
            gate.open()
            for thread in threads:
                thread.join(300)
        assert results == [image(6)[:9]] * 16
        after = server.calls("BatchReadBlobs") + server.calls("Read")
        assert after - before == 1


def test_a_full_cache_does_not_fail_a_read(make_host: HostFactory, server: EmbeddedServer) -> None:
    content = image(7, chunks=64, holes=())
    make_host("a", server).save(content)
    host = make_host("b", server, max_bytes=8 * CHUNK)
    assert host.load() == content


def test_a_hanging_server_ends_in_a_deadline(make_host: HostFactory) -> None:
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        make_host("a", server).save(image(8))
        retry = RetryPolicy(attempts=1, budget_s=1)
        host = make_host("b", server, retry=retry, timeouts=Timeouts(call_s=0.1, idle_s=0.1))
        snapshot = host.find()
        faults.add(Fault("*", hang=True, times=None))
        with host.unpack(snapshot) as unpacked, pytest.raises(DeadlineExceeded):
            unpacked.chunked_files["disk"].read_at(0, 1)


def test_sequential_reads_are_prefetched(make_host: HostFactory, server: EmbeddedServer) -> None:
    content = image(9, chunks=128, holes=())
    make_host("a", server).save(content)
    host = make_host("b", server)
    with host.unpack(host.find()) as unpacked:
        disk = unpacked.chunked_files["disk"]
        for offset in range(0, len(content), CHUNK):
            assert disk.read_at(offset, 1) == content[offset : offset + 1]
        origin = disk.statistics().origins["remote"]
    assert origin.chunks == 129
    assert origin.prefetched > 0


def test_a_restore_from_a_broken_server_leaves_nothing(make_host: HostFactory) -> None:
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        make_host("a", server).save(image(10))
        host = make_host("b", server, retry=RETRY)
        snapshot = host.find()
        faults.add(Fault("*", status="UNAVAILABLE", times=None))
        with pytest.raises(SnaploaderError):
            host.loader.restore_snapshot(snapshot, host.folder / "out")
        assert not (host.folder / "out").exists()


def flip_a_bit(path: Path) -> None:
    path.chmod(0o644)
    status = path.stat()
    with path.open("r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))
    # Bit rot leaves the times alone.
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    path.chmod(0o444)


def test_a_chunk_that_is_gone_everywhere_says_what_to_do(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    make_host("a", server).save(image(1))
    host = make_host("b", server)
    snapshot = host.find()
    lost = snapshot.tables["disk"].get(0)
    assert lost is not None
    server.delete_blob(lost)
    told = rf"lost content.*Look for a snapshot again.*{lost.hash}"
    with host.unpack(snapshot) as unpacked, pytest.raises(NotFound, match=told):
        unpacked.chunked_files["disk"].read_at(0, 1)
    with pytest.raises(NotFound, match=told):
        host.loader.restore_snapshot(snapshot, host.folder / "out")
