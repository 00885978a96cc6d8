"""Capture indexes: what did not change is not read again, and nothing that changed is missed."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from directory_states import (
    CHANGES,
    OLD_NS,
    Changes,
    fill,
    find,
    save_directory,
    saved,
    set_time,
    state_of,
    write_sparse,
)
from hypothesis import HealthCheck, given, settings, strategies as st
from loader_hosts import CHUNK, Host, HostFactory, image

from snaploader import DigestFunction
from snaploader.context import CallContext
from snaploader.digest import Digest
from snaploader.errors import FailedPrecondition, InvalidArgument, Unavailable
from snaploader.filecache import FileCache
from snaploader.loader import SnapshotLoader, directory, scan
from snaploader.loader.scan import GRANULARITY_NS, FileIdentity, is_settled, read_index, write_index
from snaploader.testing import EmbeddedServer

BLAKE3 = DigestFunction.BLAKE3


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return fill(tmp_path / "home")


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are remembered however young they are. Tests then see to it that times differ."""
    monkeypatch.setattr(scan, "GRANULARITY_NS", -(10**18))


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return tmp_path / "home.index"


def read_again(host: Host, home: Path, index: Path, **kwargs: object) -> int:
    """Save once more; the bytes that were read."""
    return saved(save_directory(host, home, index=index, **kwargs)).read_bytes


@pytest.mark.usefixtures("trusting")
def test_what_did_not_change_is_not_read_again(
    make_host: HostFactory, home: Path, index: Path, tmp_path: Path
) -> None:
    host = make_host("a")
    first = save_directory(host, home, index=index)
    second = save_directory(host, home, index=index)
    assert saved(first).read_bytes == saved(first).size_bytes - 2 * CHUNK
    assert (saved(second).read_bytes, saved(second).hashed_bytes, saved(second).stored_bytes) == (0, 0, 0)
    assert saved(second).digest == saved(first).digest
    assert saved(second).size_bytes == saved(first).size_bytes
    host.loader.restore_directory(find(host, second), "home", tmp_path / "out")
    assert state_of(tmp_path / "out") == state_of(home)


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("change", ["content", "time", "mode", "replace"])
def test_a_file_is_read_again_when_its_identity_changed(
    make_host: HostFactory, home: Path, index: Path, change: str
) -> None:
    host = make_host("a")
    save_directory(host, home, index=index)
    plain = home / "plain"
    if change == "content":
        plain.write_bytes(b"y" * 100)
    elif change == "replace":
        (home / "new").write_bytes(b"y" * 100)
        set_time(home / "new", plain.stat().st_mtime_ns)
        (home / "new").rename(plain)
    elif change == "mode":
        plain.chmod(0o600)
    if change in {"content", "time"}:
        set_time(plain, OLD_NS + 12345)
    assert read_again(host, home, index) == 100
    assert read_again(host, home, index) == 0


@pytest.mark.usefixtures("trusting")
def test_a_file_that_moved_is_read_again_and_one_that_went_is_forgotten(
    make_host: HostFactory, home: Path, index: Path
) -> None:
    host = make_host("a")
    save_directory(host, home, index=index)
    (home / "plain").rename(home / "moved")
    (home / "twin").unlink()
    result = save_directory(host, home, index=index)
    assert saved(result).read_bytes == saved(result).deduplicated_bytes == 100
    assert len(read_index(str(index), BLAKE3)) == saved(result).files


def test_what_was_written_a_moment_ago_is_read_again(
    make_host: HostFactory, tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writes within one tick of the clock may look like one."""
    host = make_host("a")
    home = tmp_path / "home"
    home.mkdir()
    (home / "young").write_bytes(b"young")
    (home / "old").write_bytes(b"old")
    save_directory(host, home, index=index)
    assert len(read_index(str(index), BLAKE3)) == 0

    now = (home / "old").stat().st_ctime_ns
    monkeypatch.setattr(directory.time, "time_ns", lambda: now + GRANULARITY_NS + 1)
    set_time(home / "young", now + GRANULARITY_NS)
    monkeypatch.setattr(directory, "is_settled", lambda identity, looked: identity.mtime_ns < now + 1)
    save_directory(host, home, index=index)
    assert read_again(host, home, index) == 5


def test_settled_means_older_than_the_granularity_on_both_counts() -> None:
    now = 10**18
    edge = now - GRANULARITY_NS
    assert is_settled(FileIdentity(1, edge - 1, 1, edge - 1), now)
    assert not is_settled(FileIdentity(1, edge, 1, edge - 1), now)
    assert not is_settled(FileIdentity(1, edge - 1, 1, edge), now)


def test_times_in_whole_seconds_settle_later() -> None:
    now = 10**18
    assert not is_settled(FileIdentity(1, now - 2 * 10**9, 1, now - 2 * 10**9), now)
    assert is_settled(FileIdentity(1, now - 3 * 10**9, 1, now - 3 * 10**9), now)
    assert is_settled(FileIdentity(1, now - 3 * 10**9, 1, now - 10**9 - 1), now)


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("kind", ["cut", "flipped", "empty", "foreign", "directory"])
def test_an_index_that_is_no_good_is_ignored_with_a_log_line(
    make_host: HostFactory, home: Path, index: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    host = make_host("a")
    first = save_directory(host, home, index=index)
    data = bytearray(index.read_bytes())
    data[len(data) // 2] ^= 1
    index.unlink()
    if kind == "directory":
        index.mkdir()
    else:
        contents = {"cut": data[:-1], "flipped": data, "empty": b"", "foreign": b"PNG" + data}
        index.write_bytes(contents[kind])
    second = save_directory(host, home, index=index)
    assert saved(second).read_bytes == saved(first).read_bytes
    assert saved(second).digest == saved(first).digest
    assert "all files are read again" in caplog.text
    assert bool(second.warnings) == (kind == "directory")


@pytest.mark.usefixtures("trusting")
def test_an_index_of_another_function_or_geometry_is_not_used(
    make_host: HostFactory, home: Path, index: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = make_host("a")
    size = saved(save_directory(host, home, index=index)).read_bytes
    disk = size - read_again(host, home, index, chunk_size=2 * CHUNK)
    # With chunks of another size only the big file is read; back again, the same.
    assert 0 < disk < size
    assert read_again(host, home, index) == 2 * CHUNK + 4
    # A file that is kept whole now: with its holes.
    assert read_again(host, home, index, chunk_threshold_bytes=1 << 20) == 4 * CHUNK + 4
    assert read_again(host, home, index, chunk_threshold_bytes=1) == size
    other = make_host("b", digest_function=DigestFunction.SHA256)
    assert read_again(other, home, index, chunk_threshold_bytes=1) == size
    assert "no SHA256 digests" in caplog.text


@pytest.mark.usefixtures("trusting")
def test_a_checksum_that_is_right_over_nonsense_is_ignored(
    make_host: HostFactory, home: Path, index: Path
) -> None:
    host = make_host("a")
    size = saved(save_directory(host, home, index=index)).read_bytes
    good = index.read_bytes()
    chance = random.Random(1)
    for _ in range(30):
        body = bytearray(good[40:])
        body[chance.randrange(32)] ^= 1 << chance.randrange(8)
        index.write_bytes(good[:8] + hashlib.sha256(body).digest() + body)
        read_index(str(index), BLAKE3)
    index.write_bytes(good[:8] + hashlib.sha256(b"").digest())
    assert read_again(host, home, index) == size


def test_indexes_survive_the_disk(tmp_path: Path) -> None:
    path = str(tmp_path / "index")
    identity = FileIdentity(5, -1, (1 << 64) - 1, 1 << 62)
    digest = Digest.of(b"hello", BLAKE3)
    write_index(path, {("a", identity): digest, ("ü/\n", identity): digest}, BLAKE3)
    index = read_index(path, BLAKE3)
    assert len(index) == 2
    assert index["a", identity] == index["ü/\n", identity] == digest
    for changed in (identity._replace(size_bytes=6), identity._replace(inode=1)):
        assert ("a", changed) not in index
    assert ("b", identity) not in index
    # What does not fit into 64 bits is not remembered.
    write_index(path, {("a", identity._replace(mtime_ns=1 << 63)): digest}, BLAKE3)
    assert len(read_index(path, BLAKE3)) == 0
    assert os.listdir(tmp_path) == ["index"]


@pytest.mark.usefixtures("trusting")
def test_the_index_is_written_when_the_manifest_stands_and_not_before(
    make_host: HostFactory, home: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a")
    save_directory(host, home, index=index)
    before = index.read_bytes()
    (home / "plain").write_bytes(b"new")
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> bool:
            raise FailedPrecondition("no refs today")

        patch.setattr(host.cache, "put_ref", fail)
        with pytest.raises(FailedPrecondition, match="no refs today"):
            save_directory(host, home, index=index)
    assert index.read_bytes() == before
    save_directory(host, home, index=index)
    assert index.read_bytes() != before


@pytest.mark.usefixtures("trusting")
def test_an_outage_of_the_remote_cache_costs_no_index(
    make_host: HostFactory, server: EmbeddedServer, home: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a", server)
    assert host.remote is not None

    def fail(*_: object) -> None:
        raise Unavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(host.remote, "write_many", fail)
        with pytest.raises(Unavailable):
            save_directory(host, home, index=index)
    assert read_again(host, home, index) == 0


@pytest.mark.usefixtures("trusting")
def test_an_index_that_cannot_be_written_is_a_warning(make_host: HostFactory, home: Path) -> None:
    result = save_directory(make_host("a"), home, index=home.parent / "nowhere/index")
    assert result.saved_locally
    assert "nowhere/index" in result.warnings[0]


def test_an_index_in_the_directory_is_refused(make_host: HostFactory, home: Path, tmp_path: Path) -> None:
    host = make_host("a")
    (tmp_path / "alias").symlink_to(home)
    for path in (home / "index", home / "etc/index", tmp_path / "alias/index"):
        with pytest.raises(InvalidArgument, match="keep it elsewhere"):
            save_directory(host, home, index=path)
    save_directory(host, home, index=home / "etc/index", exclude=["etc"])
    snapshot = find(host, save_directory(host, home))
    (tmp_path / "beside").symlink_to(tmp_path)
    for path in (tmp_path / "out/index", tmp_path / "home/../out/index", tmp_path / "beside/out/index"):
        with pytest.raises(InvalidArgument, match="keep it elsewhere"):
            host.loader.restore_directory(snapshot, "home", tmp_path / "out", index=path)
        assert not (tmp_path / "out").exists()
    host.loader.restore_directory(snapshot, "home", tmp_path / "out", index=tmp_path / "out/../index")
    assert (tmp_path / "index").exists()


# Blobs that are gone


@pytest.mark.usefixtures("trusting")
def test_blobs_that_are_in_no_cache_are_read_from_their_files(
    make_host: HostFactory, home: Path, index: Path, tmp_path: Path
) -> None:
    host = make_host("a")
    first = save_directory(host, home, index=index)
    digests = set(find(host, first).directories["home"].digests())
    for digest in digests:
        host.cache.remove(digest)
    second = save_directory(host, home, index=index)
    assert saved(second).read_bytes == sum(digest.size_bytes for digest in digests)
    assert saved(second).digest == saved(first).digest
    host.loader.restore_directory(find(host, second), "home", tmp_path / "out")
    assert state_of(tmp_path / "out") == state_of(home)


@pytest.mark.usefixtures("trusting")
def test_blobs_that_the_remote_cache_has_are_not_read_again(
    make_host: HostFactory, server: EmbeddedServer, home: Path, index: Path, tmp_path: Path
) -> None:
    host = make_host("a", server)
    first = save_directory(host, home, index=index)
    for digest in set(find(host, first).directories["home"].digests()):
        host.cache.remove(digest)
    second = save_directory(host, home, index=index)
    assert saved(second).read_bytes == 0
    host.loader.restore_directory(find(host, second), "home", tmp_path / "out")
    assert state_of(tmp_path / "out") == state_of(home)


@pytest.mark.usefixtures("trusting")
def test_a_pinned_save_is_whole_in_the_local_cache_whatever_the_remote_cache_has(
    make_host: HostFactory, server: EmbeddedServer, home: Path, index: Path, tmp_path: Path
) -> None:
    host = make_host("a", server)
    first = save_directory(host, home, index=index)
    for digest in set(find(host, first).directories["home"].digests()):
        host.cache.remove(digest)
    second = save_directory(host, home, index=index, pin="mine", remote=False)
    host.cache.prune(0)
    host.loader.restore_directory(find(host, second, "local-only"), "home", tmp_path / "out")
    assert state_of(tmp_path / "out") == state_of(home)


@pytest.mark.usefixtures("trusting")
def test_blobs_that_are_gone_are_read_from_their_files_when_the_remote_cache_cannot_tell(
    make_host: HostFactory,
    server: EmbeddedServer,
    home: Path,
    index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = make_host("a", server)
    assert host.remote is not None
    first = save_directory(host, home, index=index, remote=False)
    for digest in set(find(host, first).directories["home"].digests()):
        host.cache.remove(digest)

    def fail(*_: object) -> None:
        raise Unavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(host.remote, "find_missing", fail)
        second = save_directory(host, home, index=index, remote=False)
    assert second.warnings == ()
    host.loader.restore_directory(find(host, second, "local-only"), "home", tmp_path / "out")
    assert state_of(tmp_path / "out") == state_of(home)


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("name", ["plain", "disk"])
def test_a_file_that_lies_about_being_unchanged_is_an_error(
    make_host: HostFactory, home: Path, index: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The index says one thing, the file another, and no cache knows better: nothing wrong is published."""
    host = make_host("a")
    first = save_directory(host, home, index=index)
    path = home / name
    status = path.stat()
    with path.open("r+b") as file:
        file.write(b"?" * 10)
    set_time(path, status.st_mtime_ns)
    identity = FileIdentity.of
    monkeypatch.setattr(FileIdentity, "of", lambda status: identity(status)._replace(ctime_ns=0, inode=0))
    known = read_index(str(index), BLAKE3).items()
    rows = {(file, one._replace(ctime_ns=0, inode=0)): content for (file, one), content in known}
    write_index(str(index), rows, BLAKE3)
    for digest in set(find(host, first).directories["home"].digests()):
        host.cache.remove(digest)
    refs = host.cache.refs()
    with pytest.raises(FailedPrecondition, match="remove the capture index"):
        save_directory(host, home, index=index)
    assert host.cache.refs() == refs


# Restoring with an index


def test_after_a_restore_nothing_is_read(
    make_host: HostFactory, home: Path, index: Path, tmp_path: Path
) -> None:
    host = make_host("a")
    first = save_directory(host, home)
    out = tmp_path / "out"
    host.loader.restore_directory(find(host, first), "home", out, index=index)
    again = save_directory(host, out, index=index)
    assert saved(again).read_bytes == 0
    assert saved(again).digest == saved(first).digest
    (out / "plain").write_bytes(b"changed")
    assert read_again(host, out, index) == 7


def test_a_restore_whose_index_cannot_be_written_is_a_restore(
    make_host: HostFactory, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = make_host("a")
    snapshot = find(host, save_directory(host, home))
    host.loader.restore_directory(snapshot, "home", tmp_path / "out", index=tmp_path / "no/index")
    assert state_of(tmp_path / "out") == state_of(home)
    assert "no/index" in caplog.text


def test_a_file_that_went_after_the_restore_is_not_in_its_index(
    make_host: HostFactory, home: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a")
    snapshot = find(host, save_directory(host, home))
    out = tmp_path / "out"
    monkeypatch.setattr(CallContext, "sleep", lambda *_: (out / "plain").unlink())
    monkeypatch.setattr(scan, "GRANULARITY_NS", -(10**18))
    host.loader.restore_directory(snapshot, "home", out, index=index)
    assert len(read_index(str(index), host.loader._saver._local_function)) == 6


@pytest.mark.parametrize("name", ["plain", "disk"])
def test_a_file_written_to_before_the_restore_returned_is_not_in_its_index(
    make_host: HostFactory,
    home: Path,
    index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    host = make_host("a")
    snapshot = find(host, save_directory(host, home))
    out = tmp_path / "out"

    def write_meanwhile(*_: object) -> None:
        with (out / name).open("r+b") as file:
            file.write(b"changed")

    monkeypatch.setattr(CallContext, "sleep", write_meanwhile)
    monkeypatch.setattr(scan, "GRANULARITY_NS", -(10**18))
    host.loader.restore_directory(snapshot, "home", out, index=index)
    host.loader.restore_directory(find(host, save_directory(host, out, index=index)), "home", tmp_path / "2")
    assert state_of(tmp_path / "2") == state_of(out)


# Kill-safety: a child is killed at a step of writing the index

CHILD = """
import os, signal, sys
from snaploader import FileCache, SnapshotKey, SnapshotLoader, DirectorySource, VMConfiguration
from snaploader.loader import scan
scan.GRANULARITY_NS = -10**18
cache, home, index, step = sys.argv[1:]
real = os.replace
def replace(source, target):
    if step == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
scan.os.replace = replace
with FileCache(cache) as file_cache, SnapshotLoader(file_cache) as loader:
    loader.cache_snapshot(SnapshotKey(), directories={"home": DirectorySource(home, index=index)},
                          vm_configuration=VMConfiguration(), snapshot_id="killed")
"""


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("step", ["before", "after"])
def test_a_kill_leaves_the_old_index_or_the_new(tmp_path: Path, home: Path, index: Path, step: str) -> None:
    arguments = (str(tmp_path / "cache"), str(home), str(index), step)
    with FileCache(tmp_path / "cache") as cache, SnapshotLoader(cache) as loader:
        host = Host(loader, cache, None, tmp_path)
        kwargs = {"chunk_size": None, "chunk_threshold_bytes": 4 << 20}
        save_directory(host, home, index=index, **kwargs)
        (home / "plain").write_bytes(b"changed")
        set_time(home / "plain", OLD_NS + 7)
        before = index.read_bytes()
        killed = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments], capture_output=True, timeout=300, check=False
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert (index.read_bytes() == before) == (step == "before")
        # The manifest stood before the index, and what is read now is right in either case.
        assert list(loader.get_snapshot_by_id("killed").directories) == ["home"]
        with_index = save_directory(host, home, index=index, **kwargs)
        assert saved(with_index).read_bytes == (7 if step == "before" else 0)
        assert saved(with_index).digest == saved(save_directory(host, home, **kwargs)).digest


# Any changes, with the index and without

OPERATIONS = st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 1 << 30)), max_size=12)


@pytest.mark.slow
@pytest.mark.usefixtures("trusting")
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(OPERATIONS, min_size=1, max_size=3))
def test_a_capture_with_an_index_is_one_without(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[list[tuple[str, int]]]
) -> None:
    tmp_path = tmp_path_factory.mktemp("property")
    home = tmp_path / "home"
    home.mkdir()
    for number in range(4):
        (home / f"file-{number}").write_bytes(bytes([number]) * 50)
    write_sparse(home / "disk", [b"a" * CHUNK, None, None, image(2, 1)[:CHUNK]])
    changes = Changes(home)
    with FileCache(tmp_path / "cache") as cache, SnapshotLoader(cache) as loader:
        host = Host(loader, cache, None, tmp_path)
        for number, operations in enumerate(rounds):
            for name, seed in operations:
                changes.make(name, seed)
            with_index = save_directory(host, home, index=tmp_path / "index")
            without = save_directory(host, home)
            assert saved(with_index).digest == saved(without).digest
            assert saved(with_index).read_bytes <= saved(without).read_bytes
            out = tmp_path / f"out-{number}"
            loader.restore_directory(find(host, with_index), "home", out)
            assert state_of(out) == state_of(home)
    shutil.rmtree(tmp_path)
