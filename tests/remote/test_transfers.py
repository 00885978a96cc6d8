"""What goes up comes down: every way a blob can travel, on rich and poor servers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hashing import count_hashed_bytes
from remote_data import BLAKE3, KIB, MIB, SHA256, MakeRemote, MakeServer, named, noise, text, uploads

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.blobstore import TransferStatistics, Upload
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unimplemented,
)
from snaploader.formats.digests import DigestArray
from snaploader.remote import Limits
from snaploader.testing import PRESETS, EmbeddedServer, ServerOptions

SMALL_LIMITS = Limits(batch_bytes=256 * KIB, stream_frame_bytes=100 * KIB, workers=4)


def mixture(function: DigestFunction) -> dict[Digest, bytes]:
    blobs = [noise(n) for n in (1, 2, 255, 256, 257, 10_000, 200_000)]
    blobs += [text(n) for n in (255, 1000, 70_000, 255 * KIB, 700_000)]
    return named(*blobs, noise(900_000), b"", bytes(300_000), function=function)


@pytest.mark.parametrize("preset", ["full", *PRESETS])
@pytest.mark.parametrize("compression", [True, False])
def test_everything_comes_back_as_it_went(
    preset: str, compression: bool, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(options=PRESETS[preset]() if preset in PRESETS else ServerOptions())
    remote = make_remote(server, limits=SMALL_LIMITS, compression=compression)
    blobs = mixture(remote.digest_function)
    assert remote.find_missing(blobs) == {digest for digest in blobs if digest.size_bytes}

    done = remote.upload_missing(uploads(blobs))
    assert done.blobs == len(blobs) - 1
    assert done.content_bytes == sum(map(len, blobs.values()))
    assert remote.find_missing(blobs) == set()
    assert {digest: server.get_blob(digest) for digest in server.blobs()} == {
        d: b for d, b in blobs.items() if b
    }

    got: dict[Digest, bytes] = {}
    remote.read_many(blobs, got.__setitem__)
    assert got == blobs
    for digest, data in blobs.items():
        assert remote.read(digest) == data
        pieces: list[Buffer] = []
        remote.read_to(digest, pieces.append)
        assert b"".join(pieces) == data
    assert server.calls("Write") > 0
    assert server.calls("Read") > 0


def test_blake3_is_taken_where_offered_and_sha256_elsewhere(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    rich, poor = make_server(), make_server(digest_functions=(SHA256,))
    assert make_remote(rich).digest_function is BLAKE3
    assert make_remote(rich, digest_function=SHA256).digest_function is SHA256
    assert make_remote(poor).digest_function is SHA256
    with pytest.raises(Unimplemented, match="BLAKE3"):
        make_remote(poor, digest_function=BLAKE3).capabilities()


def test_digest_of_a_function_not_offered_is_refused(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    remote = make_remote(make_server(digest_functions=(SHA256,)))
    (digest,) = named(b"x", function=BLAKE3)
    for call in (
        lambda: remote.read(digest),
        lambda: remote.find_missing([digest]),
        lambda: remote.write(digest, b"x"),
        lambda: remote.read_many([digest], lambda *_: None),
        lambda: remote.get_action_result(digest),
    ):
        with pytest.raises(Unimplemented, match="BLAKE3"):
            call()


def test_both_functions_work_in_one_transfer(make_server: MakeServer, make_remote: MakeRemote) -> None:
    remote = make_remote(make_server())
    blobs = named(b"one", b"two") | named(b"one", b"three", function=SHA256)
    remote.upload_missing(uploads(blobs))
    assert remote.find_missing(blobs) == set()
    got: dict[Digest, bytes] = {}
    remote.read_many(blobs, got.__setitem__)
    assert got == blobs


def test_capabilities_are_asked_for_once(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server()
    remote = make_remote(server)
    remote.find_missing(named(b"x"))
    assert remote.capabilities().api_version == "2.3"
    assert remote.capabilities().zstd_streams
    assert server.calls("GetCapabilities") == 1


def test_server_without_capabilities_gets_the_least(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server(capabilities=False)
    remote = make_remote(server)
    blobs = named(text(1000), noise(3 * MIB), function=SHA256)
    assert remote.digest_function is SHA256
    remote.write_many(uploads(blobs))
    assert {digest: remote.read(digest) for digest in blobs} == blobs


def test_compression_saves_bytes_on_the_wire_and_only_where_it_helps(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server()
    remote = make_remote(server, limits=SMALL_LIMITS)
    compressible = named(text(200_000), text(800_000, 1))
    done = remote.write_many(uploads(compressible))
    assert done.content_bytes == 1_000_000
    assert done.wire_bytes < 620_000
    assert server.received_bytes() < 640_000
    sent = server.sent_bytes()
    assert remote.read_many(compressible, lambda *_: None) is None
    assert server.sent_bytes() - sent < 640_000
    incompressible = named(noise(100_000))
    assert remote.write_many(uploads(incompressible)).wire_bytes == 100_000
    statistics = remote.statistics()
    assert statistics.content_bytes_read == 1_000_000
    assert statistics.wire_bytes_read < 620_000


def test_small_blobs_share_calls_and_each_digest_goes_once(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server()
    remote = make_remote(server)
    blobs = named(*(noise(100, n) for n in range(200)))
    assert remote.write_many(uploads(blobs) * 2).blobs == 200
    assert server.calls("BatchUpdateBlobs") == 1
    seen: list[Digest] = []
    remote.read_many([*blobs, *blobs], lambda digest, _: seen.append(digest))
    assert sorted(seen) == sorted(blobs)
    assert server.calls("BatchReadBlobs") == 1


def test_two_chunks_of_the_usual_size_share_a_batch_and_one_of_a_mebibyte_has_its_own(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server()
    remote = make_remote(server)
    remote.write_many(uploads(named(*(noise(512 * KIB, n) for n in range(4)))))
    assert server.calls("BatchUpdateBlobs") == 2
    remote.write_many(uploads(named(noise(MIB))))
    assert server.calls("BatchUpdateBlobs") == 3
    assert server.calls("Write") == 0


def test_find_missing_asks_in_bounded_pages(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server()
    remote = make_remote(server, limits=Limits(find_missing_digests=100))
    blobs = named(*(noise(10, n) for n in range(250)))
    remote.write_many(uploads(dict(list(blobs.items())[:125])))
    assert remote.find_missing([*blobs, *blobs]) == set(list(blobs)[125:])
    assert server.calls("FindMissingBlobs") == 3
    assert remote.find_missing(DigestArray.of(blobs, BLAKE3)) == set(list(blobs)[125:])
    assert server.calls("FindMissingBlobs") == 6


def test_nothing_asked_is_no_call(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server()
    remote = make_remote(server)
    (empty,) = named(b"")
    got: list[bytes] = []
    remote.read_many([empty], lambda _digest, data: got.append(data))
    assert got == [b""]
    assert remote.read(empty) == b""
    assert remote.find_missing([empty]) == set()
    remote.write(empty, b"")
    assert remote.write_many([]) == TransferStatistics()
    assert server.total_calls() == server.calls("GetCapabilities") == 1


def test_uploads_come_from_files_too(
    make_server: MakeServer, make_remote: MakeRemote, tmp_path: Path
) -> None:
    server = make_server()
    remote = make_remote(server, limits=SMALL_LIMITS)
    blobs = named(noise(1000), noise(700_000), text(700_000))
    sources = []
    for number, (digest, data) in enumerate(blobs.items()):
        path = tmp_path / str(number)
        path.write_bytes(data)
        sources.append(Upload(digest, path if number else os.fspath(path)))
    remote.write_many(sources)
    assert {digest: server.get_blob(digest) for digest in blobs} == blobs


def test_buffers_of_any_kind_are_taken(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server()
    remote = make_remote(server, limits=SMALL_LIMITS)
    for data in (noise(1000), noise(500_000)):
        for number, kind in enumerate((bytearray, memoryview)):
            changed = bytes([number]) + data
            (digest,) = named(changed)
            remote.write(digest, kind(changed))
            assert server.get_blob(digest) == changed


@pytest.mark.parametrize("size", [1000, 500_000])
@pytest.mark.parametrize("compression", [True, False])
def test_wrong_content_is_never_stored(
    size: int, compression: bool, make_server: MakeServer, make_remote: MakeRemote, tmp_path: Path
) -> None:
    server = make_server()
    remote = make_remote(server, limits=SMALL_LIMITS, compression=compression)
    (digest,) = named(text(size))
    damaged = text(size)[:-1] + b"\0"
    path = tmp_path / "damaged"
    path.write_bytes(damaged)
    for source in (damaged, damaged[:-1], path):
        with pytest.raises(DataLoss, match="nothing was stored"):
            remote.write(digest, source)
    with pytest.raises(DataLoss):
        remote.write_many([Upload(digest, damaged)])
    assert server.blobs() == []


def test_missing_file_is_not_found(make_server: MakeServer, make_remote: MakeRemote, tmp_path: Path) -> None:
    remote = make_remote(make_server(), limits=SMALL_LIMITS)
    for size in (10, 500_000):
        (digest,) = named(noise(size))
        with pytest.raises(NotFound, match="gone"):
            remote.write(digest, tmp_path / "gone")


def test_existing_blob_ends_its_upload_early(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server()
    remote = make_remote(server, compression=False, limits=Limits(stream_frame_bytes=64 * KIB))
    blobs = named(noise(8 * MIB))
    assert remote.write_many(uploads(blobs)) == TransferStatistics(1, 8 * MIB, 8 * MIB, 0)
    again = remote.write_many(uploads(blobs))
    assert again.blobs + again.present_blobs == 1
    assert remote.statistics().failed_calls == {}


def test_upload_missing_counts_what_was_there(make_server: MakeServer, make_remote: MakeRemote) -> None:
    remote = make_remote(make_server(), limits=Limits(find_missing_digests=3))
    blobs = named(*(noise(100, n) for n in range(10)))
    remote.write_many(uploads(blobs)[:4])
    done = remote.upload_missing(iter(uploads(blobs)))
    assert (done.blobs, done.present_blobs) == (6, 4)


def test_absent_blob_is_not_found(make_server: MakeServer, make_remote: MakeRemote) -> None:
    remote = make_remote(make_server(), limits=SMALL_LIMITS)
    for size in (10, 500_000):
        (digest,) = named(noise(size))
        for call in (
            lambda digest=digest: remote.read(digest),
            lambda digest=digest: remote.read_to(digest, lambda _: None),
            lambda digest=digest: remote.read_many([digest], lambda *_: None),
        ):
            with pytest.raises(NotFound, match=digest.hash):
                call()
    assert remote.statistics().retries == 0


def test_first_error_ends_a_transfer_and_its_input(make_server: MakeServer, make_remote: MakeRemote) -> None:
    remote = make_remote(
        make_server(), limits=Limits(batch_bytes=10 * KIB, in_flight_bytes=64 * KIB, workers=2)
    )
    taken = []

    def source() -> object:
        for number in range(500):
            taken.append(number)
            data = noise(9000, number)
            (digest,) = named(data)
            yield Upload(digest, data if number != 3 else data[1:])

    with pytest.raises(DataLoss):
        remote.write_many(source())  # type: ignore[arg-type]
    assert len(taken) < 100


def test_error_of_the_input_is_raised(make_server: MakeServer, make_remote: MakeRemote) -> None:
    def source() -> object:
        yield from uploads(named(b"x"))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        make_remote(make_server()).write_many(source())  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [100, 500_000])
def test_error_of_a_sink_is_raised_as_itself(
    size: int, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server()
    remote = make_remote(server, limits=SMALL_LIMITS)
    digest = server.put_blob(noise(size), BLAKE3)
    for error in (KeyError("mine"), DataLoss("mine")):

        def sink(*_: object, error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            remote.read_many([digest], sink)
        assert caught.value is error
        with pytest.raises(type(error)) as caught:
            remote.read_to(digest, sink)
        assert caught.value is error
    assert remote.statistics().retries == 0


def test_action_results_come_back(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server()
    remote = make_remote(server)
    (key, other) = named(b"action", b"other")
    result = reapi.ActionResult(stdout_raw=b"hello")
    with pytest.raises(NotFound, match=key.hash):
        remote.get_action_result(key)
    remote.update_action_result(key, result)
    assert remote.get_action_result(key).stdout_raw == b"hello"
    with pytest.raises(NotFound):
        remote.get_action_result(other)


@pytest.mark.parametrize("preset", ["full", "buildgrid"])
def test_action_cache_that_takes_no_updates_says_so(
    preset: str, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(update_enabled=False)
    (key,) = named(b"action")
    with pytest.raises(FailedPrecondition, match="not let"):
        make_remote(server).update_action_result(key, reapi.ActionResult(exit_code=1))
    assert server.calls("UpdateActionResult") == 0


def test_action_result_above_the_message_limit_is_refused_here(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server()
    (key,) = named(b"action")
    with pytest.raises(ResourceExhausted, match="fewer or smaller"):
        make_remote(server).update_action_result(key, reapi.ActionResult(stdout_raw=bytes(4 * MIB)))
    assert server.calls("UpdateActionResult") == 0


def test_read_only_server_denies_writes(make_server: MakeServer, make_remote: MakeRemote) -> None:
    remote = make_remote(make_server(read_only=True), limits=SMALL_LIMITS)
    for size in (10, 500_000):
        with pytest.raises(PermissionDenied):
            remote.write_many(uploads(named(noise(size))))
    assert remote.statistics().retries == 0


def test_blob_above_the_servers_bound_is_refused_here(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(max_cas_blob_size_bytes=1000)
    remote = make_remote(server)
    with pytest.raises(ResourceExhausted, match="1000 bytes"):
        remote.write_many(uploads(named(noise(1001))))
    assert server.calls("BatchUpdateBlobs") == 0


def test_instances_are_apart(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server(instance_names=frozenset(("one", "two/b")))
    one = make_remote(server, instance_name="one", limits=SMALL_LIMITS)
    two = make_remote(server, instance_name="two/b", limits=SMALL_LIMITS)
    blobs = named(noise(100), noise(600_000))
    one.write_many(uploads(blobs))
    assert two.find_missing(blobs) == set(blobs)
    assert one.find_missing(blobs) == set()
    two.write_many(uploads(blobs))
    assert {digest: two.read(digest) for digest in blobs} == blobs
    with pytest.raises(InvalidArgument):
        make_remote(server, instance_name="three").capabilities()


def test_unix_socket_serves_as_well(make_remote: MakeRemote, tmp_path: Path) -> None:
    with EmbeddedServer(unix_socket=tmp_path / "s") as server:
        remote = make_remote(server)
        (digest,) = named(b"x")
        remote.write(digest, b"x")
        assert remote.read(digest) == b"x"


@pytest.mark.parametrize("compression", [True, False])
def test_every_byte_is_hashed_once_on_its_way(
    compression: bool,
    tmp_path: Path,
    make_server: MakeServer,
    make_remote: MakeRemote,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = make_server()
    remote = make_remote(server, limits=SMALL_LIMITS, compression=compression)
    blobs = named(*(noise(100 * KIB, n) for n in range(5)), text(MIB), noise(MIB))
    total = sum(map(len, blobs.values()))
    path = tmp_path / "blob"
    path.write_bytes(noise(MIB))
    hashed = count_hashed_bytes(monkeypatch)

    remote.write_many(uploads(blobs))
    assert hashed["remote"] == total
    remote.write_many([Upload(digest, data, verified=True) for digest, data in blobs.items()])
    remote.write_many(
        [Upload(digest, path, verified=True) for digest, data in blobs.items() if data == noise(MIB)]
    )
    assert hashed["remote"] == total

    hashed.clear()
    remote.read_many(blobs, lambda *_: None)
    assert hashed["remote"] == total


def test_verified_content_of_another_size_is_never_stored(
    tmp_path: Path, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server()
    remote = make_remote(server, limits=SMALL_LIMITS)
    path = tmp_path / "blob"
    for size in (1000, MIB):
        ((digest, data),) = named(noise(size)).items()
        path.write_bytes(data[:-1])
        for source in (data[:-1], path):
            with pytest.raises(DataLoss, match="nothing was stored"):
                remote.write_many([Upload(digest, source, verified=True)])
    assert server.blobs() == []


def test_in_flight_bytes_are_bounded(make_server: MakeServer, make_remote: MakeRemote) -> None:
    limits = Limits(batch_bytes=100 * KIB, in_flight_bytes=300 * KIB)
    remote = make_remote(make_server(), limits=limits)
    blobs = named(*(noise(50 * KIB, n) for n in range(40)))
    remote.write_many(uploads(blobs))
    most = 0

    def sink(_digest: Digest, _data: bytes) -> None:
        nonlocal most
        connection = remote._connection
        assert connection is not None
        most = max(most, connection.budget.used_bytes)

    remote.read_many(blobs, sink)
    assert 50 * KIB < most <= 300 * KIB
