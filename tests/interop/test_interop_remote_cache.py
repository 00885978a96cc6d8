"""RemoteCache against servers of other projects, as they are."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import make_certificates
from thirdparty import Server, buildgrid, casd

from snaploader._proto import remote_execution_pb2
from snaploader.blobstore import Upload
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    SnaploaderError,
    Unavailable,
    Unimplemented,
)
from snaploader.remote import Limits, RemoteCache, RetryPolicy, TLSConfig

pytestmark = pytest.mark.interop
SHA256 = DigestFunction.SHA256


@pytest.fixture
def remote(server: Server) -> Iterator[RemoteCache]:
    with RemoteCache(server.url) as cache:
        yield cache


def blob(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def upload(content: bytes) -> Upload:
    return Upload(Digest.of(content, SHA256), content)


def new_key() -> Digest:
    """A key for an action result that no other test has."""
    return Digest(uuid.uuid4().hex * 2, 1)


def proto(digest: Digest) -> remote_execution_pb2.Digest:
    return remote_execution_pb2.Digest(hash=digest.hash, size_bytes=digest.size_bytes)


def test_it_settles_on_what_the_server_has(remote: RemoteCache) -> None:
    capabilities = remote.capabilities()
    assert remote.digest_function is SHA256
    assert capabilities.digest_functions == frozenset({SHA256})


@pytest.mark.parametrize("size", [1, 4095, 512 << 10, (1 << 20) + 1, 4 << 20, (9 << 20) + 7])
def test_a_blob_of_any_size_comes_back(remote: RemoteCache, size: int) -> None:
    content = blob(size, seed=size)
    digest = Digest.of(content, SHA256)
    remote.write(digest, content)
    assert remote.find_missing([digest]) == set()
    assert remote.read(digest) == content
    remote.write(digest, content)


def test_the_empty_blob_needs_no_server(remote: RemoteCache) -> None:
    empty = Digest.of(b"", SHA256)
    remote.write(empty, b"")
    assert remote.find_missing([empty]) == set()
    assert remote.read(empty) == b""


def test_a_file_goes_up_and_comes_down_in_pieces(remote: RemoteCache, tmp_path: Path) -> None:
    content = blob((20 << 20) + 13, seed=1)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(content)
    digest = Digest.of(content, SHA256)
    remote.write(digest, source)
    with open(target, "wb") as file:
        remote.read_to(digest, file.write)
    assert target.read_bytes() == content


def test_hundreds_of_mixed_blobs_go_up_once_and_come_down_each_once(remote: RemoteCache) -> None:
    sizes = [20, 100, 4096, 65536, 200_000, 524_288]
    uploads = [upload(blob(sizes[n % len(sizes)], seed=1000 + n)) for n in range(300)]
    present, expected = uploads[::3], {entry.digest: entry.source for entry in uploads}
    remote.write_many(present)

    assert remote.find_missing(list(expected)) == set(expected) - {entry.digest for entry in present}
    moved = remote.upload_missing(uploads)
    assert (moved.present_blobs, moved.blobs) == (len(present), len(uploads) - len(present))

    received: dict[Digest, bytes] = {}
    lock = threading.Lock()

    def sink(digest: Digest, content: bytes) -> None:
        with lock:
            assert digest not in received
            received[digest] = content

    remote.read_many(expected, sink)
    assert received == expected


def test_batches_beyond_the_message_limit_get_through(server: Server) -> None:
    uploads = [upload(blob(512 << 10, seed=2000 + n)) for n in range(24)]
    limits = Limits(batch_bytes=64 << 20)
    with RemoteCache(server.url, limits=limits) as remote:
        remote.write_many(uploads)
        received: list[Digest] = []
        remote.read_many([entry.digest for entry in uploads], lambda digest, content: received.append(digest))
    assert sorted(received) == sorted(entry.digest for entry in uploads)


def test_seventy_thousand_digests_are_asked_for(remote: RemoteCache) -> None:
    absent = [Digest(f"{n:064x}", n + 1) for n in range(70_000)]
    held = upload(blob(3000, seed=3))
    remote.write(held.digest, held.source)
    assert remote.find_missing([*absent, held.digest]) == set(absent)


def test_what_is_not_there_is_not_found(remote: RemoteCache) -> None:
    absent = Digest.of(b"never stored", SHA256)
    with pytest.raises(NotFound):
        remote.read(absent)
    with pytest.raises(NotFound):
        remote.read(Digest(absent.hash, 50 << 20))
    with pytest.raises(NotFound):
        remote.read_many([absent], lambda digest, content: None)
    with pytest.raises(NotFound):
        remote.get_action_result(absent)


def test_content_that_is_not_its_digest_is_refused(remote: RemoteCache) -> None:
    right, wrong = b"right" * 1000, b"wrong" * 1000
    with pytest.raises(DataLoss):
        remote.write(Digest.of(right, SHA256), wrong)
    assert remote.find_missing([Digest.of(right, SHA256)])


def test_an_action_result_is_kept_and_replaced(remote: RemoteCache) -> None:
    key = new_key()
    for content in (b"first", b"second"):
        output = upload(content * 100)
        remote.write(output.digest, output.source)
        result = remote_execution_pb2.ActionResult()
        result.output_files.add(path="file").digest.MergeFrom(proto(output.digest))
        result.execution_metadata.auxiliary_metadata.add(type_url="example/metadata", value=content)
        remote.update_action_result(key, result)
        found = remote.get_action_result(key)
        assert found.output_files[0].digest.hash == output.digest.hash
        assert found.execution_metadata.auxiliary_metadata[0].value == content


def test_an_action_result_with_a_tree_of_chunks_is_complete_or_not_there(remote: RemoteCache) -> None:
    chunks = [upload(blob(1000, seed=4000 + n)) for n in range(3)]
    tree = remote_execution_pb2.Tree()
    for n, chunk in enumerate(chunks):
        tree.root.files.add(name=str(n)).digest.MergeFrom(proto(chunk.digest))
    encoded = upload(tree.SerializeToString(deterministic=True))
    result = remote_execution_pb2.ActionResult()
    result.output_directories.add(path="disk.img").tree_digest.MergeFrom(proto(encoded.digest))
    key = new_key()

    remote.write_many([*chunks[:2], encoded])
    remote.update_action_result(key, result)
    with pytest.raises(NotFound):
        remote.get_action_result(key)
    remote.write(chunks[2].digest, chunks[2].source)
    remote.update_action_result(key, result)
    assert remote.get_action_result(key).output_directories[0].path == "disk.img"


def test_an_instance_the_server_does_not_have_is_an_invalid_argument(server: Server) -> None:
    with RemoteCache(server.url, instance_name="elsewhere") as remote, pytest.raises(InvalidArgument):
        remote.find_missing([Digest.of(b"x", SHA256)])


def test_a_digest_function_the_server_does_not_have_is_a_clear_error(server: Server) -> None:
    blake3 = DigestFunction.BLAKE3
    with (
        RemoteCache(server.url, digest_function=blake3) as remote,
        pytest.raises(Unimplemented, match="BLAKE3"),
    ):
        remote.find_missing([Digest.of(b"x", blake3)])


def test_many_threads_share_one_cache(remote: RemoteCache) -> None:
    uploads = [upload(blob(50_000, seed=5000 + n)) for n in range(32)]
    problems: list[BaseException] = []

    def work(entry: Upload) -> None:
        try:
            remote.write(entry.digest, entry.source)
            assert remote.read(entry.digest) == entry.source
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=[entry]) for entry in uploads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


class TestCasd:
    """What only buildbox-casd can show."""

    pytestmark = pytest.mark.xdist_group("casd")

    def test_it_is_spoken_to_over_a_unix_socket(self, tmp_path: Path) -> None:
        content = upload(blob(3 << 20, seed=6))
        with casd(tmp_path, unix=True) as server, RemoteCache(server.url) as remote:
            remote.write(content.digest, content.source)
            assert remote.read(content.digest) == content.source

    @pytest.mark.parametrize("size", [70_000, 5 << 20])
    def test_bytes_that_rot_on_the_server_are_data_loss(self, casd_server: Server, size: int) -> None:
        content = upload(blob(size, seed=70 + size))
        with RemoteCache(casd_server.url) as remote:
            remote.write(content.digest, content.source)
            path = object_path(casd_server, content.digest)
            path.chmod(0o644)
            with open(path, "r+b") as file:
                file.seek(size // 2)
                file.write(b"ROT")
            with pytest.raises(DataLoss):
                remote.read(content.digest)
            with pytest.raises(DataLoss):
                remote.read_many([content.digest], lambda digest, data: None)

    def test_a_blob_the_server_lost_is_missing_and_comes_back(self, casd_server: Server) -> None:
        content = upload(blob(70_000, seed=8))
        key = new_key()
        result = remote_execution_pb2.ActionResult()
        result.output_files.add(path="file").digest.MergeFrom(proto(content.digest))
        with RemoteCache(casd_server.url) as remote:
            remote.write(content.digest, content.source)
            remote.update_action_result(key, result)
            object_path(casd_server, content.digest).unlink()
            with pytest.raises(NotFound):
                remote.get_action_result(key)
            assert remote.upload_missing([content]).blobs == 1
            assert remote.read(content.digest) == content.source

    def test_a_server_that_stops_is_unavailable_and_found_again(self, tmp_path: Path) -> None:
        content = upload(blob(1000, seed=9))
        quickly = RetryPolicy(attempts=2, initial_delay_s=0.01)
        with RemoteCache(f"unix:{tmp_path}/casd.sock", retry=quickly) as remote:
            with casd(tmp_path, unix=True):
                remote.write(content.digest, content.source)
            with pytest.raises(Unavailable):
                remote.read(content.digest)
        with casd(tmp_path, unix=True) as server, RemoteCache(server.url) as remote:
            assert remote.read(content.digest) == content.source


class TestBuildGrid:
    """What only BuildGrid can show."""

    pytestmark = pytest.mark.xdist_group("buildgrid")

    def test_a_named_instance_is_used_by_its_name(self, tmp_path: Path) -> None:
        content = upload(blob(2 << 20, seed=10))
        with buildgrid(tmp_path, instance="team/one") as server:
            with RemoteCache(server.url, instance_name="team/one") as remote:
                remote.write(content.digest, content.source)
                assert remote.read(content.digest) == content.source
            with RemoteCache(server.url) as remote, pytest.raises(InvalidArgument):
                remote.read(content.digest)

    def test_a_server_that_takes_nothing_says_so(self, tmp_path: Path) -> None:
        content = upload(b"content")
        refused = (FailedPrecondition, PermissionDenied, Unimplemented)
        with (
            buildgrid(tmp_path, allow_updates=False, read_only=True) as server,
            RemoteCache(server.url) as remote,
        ):
            assert remote.find_missing([content.digest]) == {content.digest}
            with pytest.raises(refused):
                remote.write(content.digest, content.source)
            with pytest.raises(refused):
                remote.update_action_result(content.digest, remote_execution_pb2.ActionResult())

    def test_both_sides_prove_who_they_are(self, tmp_path: Path) -> None:
        certificates = make_certificates(tmp_path)
        content = upload(blob(2 << 20, seed=11))
        server_side = {
            "tls-server-key": certificates["server.key"],
            "tls-server-cert": certificates["server.crt"],
            "tls-client-certs": certificates["ca.crt"],
        }
        tls = TLSConfig(
            certificate=certificates["ca.crt"],
            client_certificate=certificates["client.crt"],
            client_key=certificates["client.key"],
        )
        once = RetryPolicy(attempts=1)
        with buildgrid(tmp_path / "server", tls=server_side) as server:
            with RemoteCache(server.url, tls=tls) as remote:
                remote.write(content.digest, content.source)
                assert remote.read(content.digest) == content.source
            for refused in (TLSConfig(certificate=certificates["ca.crt"]), TLSConfig()):
                with (
                    RemoteCache(server.url, tls=refused, retry=once) as remote,
                    pytest.raises(SnaploaderError),
                ):
                    remote.read(content.digest)


def object_path(server: Server, digest: Digest) -> Path:
    """Where buildbox-casd keeps a blob."""
    return server.data / "cas" / "objects" / digest.hash[:2] / digest.hash[2:]
