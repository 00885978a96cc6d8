"""Snapshots as a file system of fsspec: what stands where, what is fetched, and who closes what."""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import stat
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

fsspec = pytest.importorskip("fsspec", reason="fsspec is missing: install snaploader[fsspec]")

from snaploader import (  # noqa: E402 - after what may skip all of it
    CallContext,
    DeadlineExceeded,
    DirectorySource,
    FailedPrecondition,
    FileCache,
    InvalidArgument,
    NotFound,
    RemoteCache,
    SnapshotKeySet,
    SnapshotLoader,
    SnapshotTask,
    Unavailable,
)
from snaploader.context import Secret  # noqa: E402
from snaploader.fsspec import SnapshotFileSystem, _registry, snapshot_url  # noqa: E402
from snaploader.testing import EmbeddedServer, FakeCAS  # noqa: E402

CHUNK = 4096
DISK = os.urandom(8 * CHUNK) + bytes(2 * CHUNK) + os.urandom(100)
NOTES = b"some notes\n" * 10
MTIME = 1_600_000_000.5


@dataclass
class Saved:
    """What another host has saved."""

    cas: FakeCAS
    ids: dict[str, str]
    """The id of the snapshot of each branch."""


def save(remote: Any, folder: Path, *branches: str, disk: bytes = DISK) -> dict[str, str]:
    home = folder / "home"
    (home / "sub").mkdir(parents=True, exist_ok=True)
    (home / "notes").write_bytes(NOTES)
    (home / "sub" / "big").write_bytes(disk)
    for name, target in {"link": "notes", "to-sub": "sub", "sub/loop": "..", "broken": "none"}.items():
        if not (home / name).is_symlink():
            (home / name).symlink_to(target)
    os.utime(home / "notes", (MTIME, MTIME))
    (folder / "disk").write_bytes(disk)
    ids = {}
    with FileCache(folder / "cache") as cache, SnapshotLoader(cache, remote) as loader:
        for branch in branches:
            task = SnapshotTask.from_mapping((), {"GIT_BRANCH": branch})
            ids[branch] = loader.cache_snapshot(
                loader.snapshot_key_set(task, "conf").write_key,
                chunked_files={"disk": folder / "disk"},
                files={"kernel": home / "notes"},
                directories={"home": DirectorySource(home, chunk_threshold_bytes=CHUNK)},
                chunk_size=CHUNK,
            ).snapshot_id
    return ids


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    cas = FakeCAS()
    return Saved(cas, save(cas, tmp_path / "other", "main", "feature/x", "@odd"))


Make = Callable[..., SnapshotFileSystem]


@pytest.fixture
def make(saved: Saved, tmp_path: Path) -> Iterator[Make]:
    """Makes file systems, and closes them."""
    made = []

    def make(**options: Any) -> SnapshotFileSystem:
        options = {"file_cache": str(tmp_path / "cache"), "remote_cache": saved.cas} | options
        made.append(SnapshotFileSystem(configuration_hash="conf", **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
    SnapshotFileSystem.clear_instance_cache()


@pytest.fixture
def fs(make: Make) -> SnapshotFileSystem:
    return make()


def test_the_protocol_is_found_without_importing_this_library(make: Make, saved: Saved) -> None:
    assert fsspec.get_filesystem_class("snap") is SnapshotFileSystem
    make()
    options = make().storage_options
    assert fsspec.filesystem("snap", **options) is make()
    with fsspec.open("snap://main/home/notes", "rb", **options) as file:
        assert file.read() == NOTES
    with fsspec.open("snap://main/home/notes", "rt", **options) as file:
        assert file.readline() == "some notes\n"


@pytest.mark.parametrize(
    ("url", "content"),
    [
        ("snap://main/disk", DISK),
        ("main/disk", DISK),
        ("snap://main/kernel", NOTES),
        ("snap://feature%2Fx/home/notes", NOTES),
        ("snap://feature%2fx/home/sub/big", DISK),
        ("snap://%40odd/home/link", NOTES),
        ("snap://main/home/to-sub/big", DISK),
    ],
)
def test_a_url_leads_to_a_file(fs: SnapshotFileSystem, url: str, content: bytes) -> None:
    assert fs.cat(url) == content
    with fs.open(url) as file:
        assert file.read() == content
    assert fs.info(url)["size"] == fs.size(url) == len(content)


def test_a_url_with_an_id_leads_to_exactly_that_snapshot(fs: SnapshotFileSystem, saved: Saved) -> None:
    url = snapshot_url("home/notes", snapshot_id=saved.ids["feature/x"])
    assert fs.cat(url) == NOTES
    assert fs.snapshot(url).key.snapshot_id == saved.ids["feature/x"]


def test_a_key_set_is_read_as_it_says_with_its_fallbacks(make: Make, saved: Saved, tmp_path: Path) -> None:
    with FileCache(tmp_path / "keys") as cache, SnapshotLoader(cache, saved.cas) as loader:
        task = SnapshotTask.from_mapping((), {"GIT_BRANCH": "new", "GIT_BASE_BRANCH": "main"})
        key_set: SnapshotKeySet = loader.snapshot_key_set(task, "conf")
        fs = make(key_set=key_set, file_cache=None, remote_cache=None, loader=loader)
        assert fs.cat("snap://@/kernel") == NOTES
        assert fs.snapshot("snap://@").key.ref == "main"
        fs.close()
        assert loader.get_snapshot(key_set)  # it is not closed with the file system
        with pytest.raises(NotFound, match="key without a ref"):
            make().cat("snap://@/kernel")


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        ({"ref": "main"}, "snap://main"),
        ({"path": "disk", "ref": "main"}, "snap://main/disk"),
        ({"path": "a/b", "ref": "feature/x"}, "snap://feature%2Fx/a/b"),
        ({"path": "a%2Fb", "ref": "100%"}, "snap://100%25/a%2Fb"),
        ({"path": "a", "ref": "@odd"}, "snap://%40odd/a"),
        ({"path": "a", "ref": "x@y"}, "snap://x@y/a"),
        ({"path": "a", "ref": "x::y"}, "snap://x:%3Ay/a"),
        ({"path": "a", "snapshot_id": "4f/0c"}, "snap://@4f%2F0c/a"),
        ({"path": "a", "snapshot_id": "@"}, "snap://@@/a"),
        ({"path": "a"}, "snap://@/a"),
    ],
)
def test_urls_are_unambiguous(arguments: dict[str, str], url: str) -> None:
    assert snapshot_url(**arguments) == url
    stripped = SnapshotFileSystem._strip_protocol(url)
    assert stripped == url.removeprefix("snap://")
    assert SnapshotFileSystem._strip_protocol(stripped) == stripped
    assert fsspec.core.split_protocol(url) == ("snap", stripped)


def test_the_urls_of_the_documentation_are_those_that_are_made() -> None:
    page = Path(__file__).parents[2] / "docs" / "fsspec.md"
    rows = re.findall(r"^\| (.+?) \| (.+?) \| `(snap:.+)` \|$", page.read_text(), re.MULTILINE)
    assert len(rows) == 8
    for what, snapshot, url in rows:
        path = "/".join(reversed(re.findall(r"`(.+?)`", what)))
        (name,) = re.findall(r"`(.+?)`", snapshot)
        if "branch" in snapshot:
            assert snapshot_url(path, ref=name) == url
        else:
            assert snapshot_url(path, snapshot_id=name if "id" in snapshot else None) == url


@pytest.mark.parametrize("arguments", [{"ref": "a", "snapshot_id": "b"}, {"ref": ""}, {"snapshot_id": ""}])
def test_a_url_names_one_snapshot(arguments: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match="name one snapshot"):
        snapshot_url("disk", **arguments)


def test_a_path_without_a_snapshot_is_refused(fs: SnapshotFileSystem) -> None:
    for path in ("", "snap://", "snap:///disk", "/main"):
        with pytest.raises(InvalidArgument, match="names no snapshot"):
            fs.ls(path)


def test_listings_say_what_there_is(fs: SnapshotFileSystem) -> None:
    assert fs.ls("snap://main", detail=False) == ["main/disk", "main/home", "main/kernel"]
    assert fs.ls("main/disk") == [fs.info("main/disk")]
    assert fs.ls("main/home/to-sub", detail=False) == ["main/home/to-sub/big", "main/home/to-sub/loop"]
    listed = {each["name"]: each for each in fs.ls("snap://main/home/")}
    assert {name.removeprefix("main/home/"): each["type"] for name, each in listed.items()} == {
        "broken": "link",
        "link": "file",
        "notes": "file",
        "sub": "directory",
        "to-sub": "link",
    }
    notes = listed["main/home/notes"]
    assert (notes["size"], notes["mtime"], notes["islink"]) == (len(NOTES), MTIME, False)
    assert stat.S_ISREG(notes["mode"])
    assert notes["digest"] == str(fs.snapshot("main").manifest.files["kernel"].digest)
    assert listed["main/home/link"]["destination"] == "notes"
    assert listed["main/home/broken"]["islink"]
    assert fs.info("main/home/to-sub")["type"] == "directory"
    assert fs.info("main")["type"] == fs.info("main/home")["type"] == "directory"
    assert "mtime" not in fs.info("main/disk")


def test_walking_ends_and_finds_everything(fs: SnapshotFileSystem) -> None:
    assert list(fs.walk("main/home")) == [
        ("main/home", ["sub"], ["broken", "link", "notes", "to-sub"]),
        ("main/home/sub", [], ["big", "loop"]),
    ]
    assert fs.find("main/home/sub") == ["main/home/sub/big", "main/home/sub/loop"]
    assert fs.glob("snap://main/home/*/big") == ["main/home/sub/big"]
    assert fs.glob("main/home/n*") == ["main/home/notes"]
    assert fs.du("main/home/sub", total=False)["main/home/sub/big"] == len(DISK)
    assert fs.glob("feature%2Fx/*") == ["feature%2Fx/disk", "feature%2Fx/home", "feature%2Fx/kernel"]


def test_what_exists_is_a_file_or_a_directory_or_leads_to_one(fs: SnapshotFileSystem) -> None:
    files = ["main/disk", "main/home/notes", "main/home/link", "main/home/to-sub/big"]
    directories = ["main", "main/home", "main/home/to-sub"]
    absent = ["none/disk", "main/none", "main/disk/x", "main/home/none", "@none/disk", "main/home/broken"]
    for path in (*files, *directories, *absent):
        assert (fs.isfile(path), fs.isdir(path)) == (path in files, path in directories)
        assert fs.exists(path) == (path not in absent)
    assert fs.lexists("main/home/broken")
    assert not fs.lexists("main/home/none")


@pytest.mark.parametrize("path", ["main/none", "main/home/none", "main/home/broken", "main/disk/x"])
def test_what_is_not_there_is_the_usual_error(fs: SnapshotFileSystem, path: str) -> None:
    for call in (fs.open, fs.cat_file, fs.ukey, fs.cat):
        with pytest.raises(FileNotFoundError) as caught:
            call(path)
        assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("path", ["none/disk", "@none/disk", "@/disk"])
def test_a_snapshot_that_is_not_there_is_no_file_that_is_not_there(fs: SnapshotFileSystem, path: str) -> None:
    for call in (fs.open, fs.cat_file, fs.info, fs.ls, fs.find, fs.cat, lambda path: fs.glob(path + "*")):
        with pytest.raises(NotFound):
            call(path)


def test_snapshots_that_were_not_used_for_long_are_let_go_of(
    fs: SnapshotFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snaploader.fsspec.MAX_SNAPSHOTS", 2)
    first, second = fs.open("main/disk"), fs.open("feature%2Fx/disk")
    assert fs.exists("main/disk")
    assert fs.exists("%40odd/disk")
    assert first.read(1) == DISK[:1]
    assert second.read(1) == DISK[:1]  # a file is open on it, so it was not closed
    old = weakref.ref(second.raw._reader)
    held = old().held
    closed = []
    held.callback(closed.append, True)
    del second
    assert old() is None
    assert fs.cat("feature%2Fx/disk") == DISK
    assert closed == [True]


def test_a_directory_is_no_file(fs: SnapshotFileSystem) -> None:
    for call in (fs.open, fs.cat_file):
        with pytest.raises(IsADirectoryError):
            call("main/home")


def test_four_kibibytes_of_a_chunked_file_take_one_chunk(fs: SnapshotFileSystem, saved: Saved) -> None:
    fs.info("main/home/sub/big")
    saved.cas.reads.clear()
    with fs.open("main/home/sub/big") as file:
        file.seek(2 * CHUNK)
        assert file.read(CHUNK) == DISK[2 * CHUNK : 3 * CHUNK]
    assert saved.cas.reads.total() == 1
    assert fs.cat_file("main/disk", 3 * CHUNK, 4 * CHUNK) == DISK[3 * CHUNK : 4 * CHUNK]
    assert saved.cas.reads.total() == 2
    assert fs.cat_file("main/disk", 8 * CHUNK, 10 * CHUNK) == bytes(2 * CHUNK)
    assert saved.cas.reads.total() == 2


@pytest.mark.parametrize(
    ("start", "end"),
    [(None, None), (5, 10), (-5, None), (None, -5), (-10, -5), (10, 5), (5, 10**9), (10**9, None)],
)
def test_ranges_are_those_of_slices(fs: SnapshotFileSystem, start: int | None, end: int | None) -> None:
    assert fs.cat_file("main/disk", start, end) == DISK[start:end]
    assert fs.read_bytes("main/disk", start, end) == DISK[start:end]


def test_the_usual_shorthands_work(fs: SnapshotFileSystem, tmp_path: Path) -> None:
    assert fs.head("main/disk", 10) == DISK[:10]
    assert fs.tail("main/disk", 10) == DISK[-10:]
    assert fs.read_text("main/kernel") == NOTES.decode()
    assert fs.read_block("main/kernel", 0, 15, delimiter=b"\n") == NOTES[:22]
    assert fs.get_mapper("main/home")["notes"] == NOTES
    fs.get("main/home/sub/big", str(tmp_path / "got"))
    assert (tmp_path / "got").read_bytes() == DISK
    with fs.open("main/disk", block_size=10) as file:
        assert isinstance(file, io.BufferedReader)
        assert file.read(20) == DISK[:20]


def test_many_ranges_of_several_snapshots_come_together(fs: SnapshotFileSystem, saved: Saved) -> None:
    fs.ls("main/home")
    fs.ls("feature%2Fx")
    saved.cas.calls.clear()
    paths = ["main/disk", "feature%2Fx/disk", "main/kernel", "main/none", "main/disk"]
    data = fs.cat_ranges(paths, [0, CHUNK, -4, 0, 5 * CHUNK], [10, CHUNK + 5, None, 1, None])
    assert isinstance(data[3], FileNotFoundError)
    expected = [DISK[:10], DISK[CHUNK : CHUNK + 5], NOTES[-4:], data[3], DISK[5 * CHUNK :]]
    assert data == expected
    assert fs.cat_ranges(paths[:2], 0, 3) == [DISK[:3], DISK[:3]]
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges(paths, 0, 1, on_error="raise")
    with pytest.raises(ValueError, match="as many"):
        fs.cat_ranges(paths, [0], [1])
    with pytest.raises(TypeError):
        fs.cat_ranges("main/disk", 0, 1)


def test_several_files_are_read_at_once(fs: SnapshotFileSystem) -> None:
    both = {"main/disk": DISK, "main/kernel": NOTES}
    assert fs.cat(["main/disk", "snap://main/kernel"]) == both
    assert fs.cat("main/home/sub/b*") == {"main/home/sub/big": DISK}
    found = fs.cat("main/home", recursive=True)
    assert found == {
        "main/home/link": NOTES,
        "main/home/notes": NOTES,
        "main/home/sub/big": DISK,
    }
    with pytest.raises(FileNotFoundError):
        fs.cat(["main/disk", "main/none"])


def test_lost_content_is_no_file_that_is_not_there(fs: SnapshotFileSystem, saved: Saved) -> None:
    fs.ls("main")
    kept = dict(saved.cas.blobs)
    saved.cas.blobs.clear()
    # An array of zarr reads a chunk that is not there as zeros.
    for call in (lambda: fs.cat_file("main/disk"), lambda: fs.open("main/kernel").read()):
        with pytest.raises(NotFound, match="lost content"):
            call()
    for error in fs.cat_ranges(["main/disk", "main/kernel"], 0, 1):
        assert isinstance(error, NotFound)
        assert not isinstance(error, OSError)
    saved.cas.blobs.update(kept)
    assert fs.cat("main/disk") == DISK


@pytest.mark.parametrize("outage", [Unavailable, DeadlineExceeded])
def test_an_outage_is_no_file_that_is_not_there(
    fs: SnapshotFileSystem, saved: Saved, outage: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise outage("the server sleeps")

    monkeypatch.setattr(saved.cas, "get_action_result", fail)
    calls: list[Callable[[str], object]] = [
        fs.exists,
        fs.isdir,
        fs.isfile,
        fs.lexists,
        fs.info,
        fs.cat,
        fs.open,
    ]
    for call in [*calls, lambda path: list(fs.walk(path)), fs.glob, fs.find]:
        with pytest.raises(Unavailable, match="the server sleeps"):
            call("main/home")
    monkeypatch.undo()
    assert fs.exists("main/home")


@pytest.mark.parametrize(
    "write",
    [
        lambda fs: fs.open("main/new", "wb"),
        lambda fs: fs.open("main/disk", "ab"),
        lambda fs: fs.open("main/disk", "w"),
        lambda fs: fs.open("main/disk", "r+b"),
        lambda fs: fs.pipe("main/new", b""),
        lambda fs: fs.pipe_file("main/new", b""),
        lambda fs: fs.put(__file__, "main/new"),
        lambda fs: fs.touch("main/new"),
        lambda fs: fs.mkdir("main/new"),
        lambda fs: fs.makedirs("main/new"),
        lambda fs: fs.rmdir("main/home"),
        lambda fs: fs.rm("main/disk"),
        lambda fs: fs.rm_file("main/disk"),
        lambda fs: fs.delete("main/disk"),
        lambda fs: fs.cp("main/disk", "main/new"),
        lambda fs: fs.mv("main/disk", "main/new"),
        lambda fs: fs.rename("main/disk", "main/new"),
        lambda fs: fs.write_text("main/new", ""),
    ],
)
def test_writing_is_an_error_that_says_what_to_do(
    fs: SnapshotFileSystem, write: Callable[[SnapshotFileSystem], object]
) -> None:
    with pytest.raises(OSError, match="save another one with SnapshotLoader") as caught:
        write(fs)
    assert caught.value.errno == errno.EROFS


def test_a_key_of_content_changes_with_content_alone(
    fs: SnapshotFileSystem, saved: Saved, tmp_path: Path
) -> None:
    same = [fs.ukey(path) for path in ("main/disk", "feature%2Fx/disk", "main/home/to-sub/big")]
    assert len(set(same)) == 1
    assert fs.ukey("main/kernel") == fs.ukey("main/home/link") != same[0]
    assert fs.ukey("main/home") != fs.ukey("main/home/sub")
    save(saved.cas, tmp_path / "third", "third", disk=DISK[:-1])
    assert fs.ukey("third/disk") != same[0]
    assert fs.checksum("main/disk") == int(same[0], 16)


def test_times_are_those_of_files_in_directories(fs: SnapshotFileSystem) -> None:
    assert fs.modified("main/home/notes") == datetime.fromtimestamp(MTIME, UTC)
    with pytest.raises(NotImplementedError):
        fs.modified("main/disk")


def test_a_branch_stays_one_snapshot_until_it_is_looked_for_again(
    fs: SnapshotFileSystem, saved: Saved, tmp_path: Path
) -> None:
    kept, renewed = fs.open("main/disk"), fs.open("feature%2Fx/disk")
    fs.invalidate_cache()
    assert fs.cat("main/disk") == DISK
    assert kept.read() == DISK  # the snapshot is still the same
    save(saved.cas, tmp_path / "other", "main", disk=NOTES * 100)
    assert fs.cat("main/disk") == DISK
    fs.invalidate_cache("feature%2Fx/disk")
    assert fs.cat("main/disk") == DISK
    fs.invalidate_cache("snap://main")
    # The local manifest was not written, so the remote one counts.
    assert fs.cat("main/disk") == NOTES * 100
    assert renewed.read(5) == DISK[:5]


def test_file_systems_with_equal_options_share_what_they_open(make: Make, saved: Saved) -> None:
    make().cat("main/disk")
    saved.cas.calls.clear()
    barrier = threading.Barrier(4, timeout=60)

    def read(_: int) -> bytes:
        fs = make()  # another object in each thread: so fsspec does it
        barrier.wait()
        return bytes(fs.cat("main/disk"))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [DISK] * 4
    assert not saved.cas.calls


def test_options_that_differ_in_a_secret_alone_share_nothing(served: dict[str, Any]) -> None:
    first, again = SnapshotFileSystem(**served), SnapshotFileSystem(**served)
    assert _registry.opened(first._options) is _registry.opened(again._options)
    one, other = (
        SnapshotFileSystem(
            **served | {"remote_cache_options": {"headers": {"token": Secret(token)}}},
            skip_instance_cache=True,
        )
        for token in ("a", "b")
    )
    assert _registry.opened(one._options) is not _registry.opened(other._options)
    for fs in (first, one, other):
        fs.close()


def test_one_snapshot_is_looked_for_once_by_many_threads(make: Make, saved: Saved) -> None:
    fs, barrier = make(), threading.Barrier(8, timeout=60)

    def read(_: int) -> bytes:
        barrier.wait()
        return bytes(fs.cat_file("main/home/sub/big", 0, CHUNK))

    saved.cas.reads.clear()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == [DISK[:CHUNK]] * 8
    assert max(saved.cas.reads.values()) == 1


def test_callers_do_not_see_what_others_have_found(fs: SnapshotFileSystem, saved: Saved) -> None:
    with CallContext(group_id="team").use():
        found = fs.snapshot("main")
    with CallContext(group_id="other").use():
        assert fs.snapshot("main") is not found
        saved.cas.action_results.clear()
        fs.invalidate_cache()
        with pytest.raises(NotFound):
            fs.cat("main/disk")


def test_it_can_be_used_again_after_it_was_closed(make: Make) -> None:
    with make() as fs:
        file = fs.open("main/disk")
    with pytest.raises(Exception, match="closed"):
        file.read()
    assert fs.cat("main/disk") == DISK
    fs.close()
    fs.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Options that mean the same in another process."""
    with EmbeddedServer() as server:
        with RemoteCache(server.url) as remote:
            save(remote, tmp_path / "other", "main")
        yield {
            "file_cache": str(tmp_path / "cache"),
            "remote_cache": server.url,
            "configuration_hash": "conf",
            "file_cache_options": {"max_bytes": 1 << 30},
            "remote_cache_options": {"compression": False},
        }


def test_a_pickled_file_system_reads_in_another_process(served: dict[str, Any]) -> None:
    with SnapshotFileSystem(**served, skip_instance_cache=True) as fs:
        assert fs.cat("main/kernel") == NOTES
    # It is not closed: nothing is printed when the process ends.
    script = f"""
import pickle, sys
fs = pickle.loads({pickle.dumps(fs)!r})
sys.stdout.buffer.write(fs.cat("snap://main/disk"))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", DISK)


def test_a_file_system_with_objects_says_what_cannot_be_pickled(make: Make, tmp_path: Path) -> None:
    with FileCache(tmp_path / "own") as cache:
        fs = make(file_cache=cache)
        assert fs.cat("main/disk") == DISK
        with pytest.raises(TypeError, match="on the same folder"):
            pickle.dumps(fs)
        fs.close()
        assert cache.statistics().added_blobs  # it is not closed with the file system


def test_a_forked_child_opens_its_own_caches(served: dict[str, Any]) -> None:
    script = f"""
import os, sys, threading
from snaploader.fsspec import SnapshotFileSystem
fs = SnapshotFileSystem(**{served!r})
file = fs.open("snap://main/disk")
assert len(file.read(10)) == 10
child = os.fork()
data = fs.cat("snap://main/disk")
if child == 0:
    fs.close()
    os._exit(0 if len(data) == {len(DISK)} else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert len(fs.cat("snap://main/kernel")) == {len(NOTES)}
fs.close()
"""
    environment = {**os.environ, "GRPC_VERBOSITY": "NONE"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "file_cache is missing"),
        ({"remote_cache": "grpc://localhost:1"}, "file_cache is missing"),
        ({"file_cache": "cache", "loader": object()}, "either a loader"),
        ({"file_cache": "cache", "remote_cache_options": {"netrc": "x"}}, "URL of a remote cache"),
        ({"file_cache": "cache", "read_policy": "oldest"}, "oldest"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        SnapshotFileSystem(**options)


def test_an_object_and_options_for_one_are_refused(tmp_path: Path) -> None:
    with (
        FileCache(tmp_path) as cache,
        pytest.raises(InvalidArgument, match="belong to a folder"),
    ):
        SnapshotFileSystem(cache, file_cache_options={"max_bytes": 1})


def test_without_fsspec_the_error_names_the_extra() -> None:
    script = "import sys; sys.modules['fsspec'] = None; import snaploader.fsspec"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "snaploader.fsspec needs fsspec: install snaploader[fsspec]" in done.stderr


def test_a_call_waits_for_anothers_search_no_longer_than_it_may(
    fs: SnapshotFileSystem, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, proceed = threading.Event(), threading.Event()
    get = saved.cas.get_action_result

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert proceed.wait(60)
        return get(*args, **kwargs)

    monkeypatch.setattr(saved.cas, "get_action_result", slow)
    with ThreadPoolExecutor(1) as pool:
        patient = pool.submit(fs.cat, "main/disk")
        assert begun.wait(60)
        with CallContext(timeout_s=0.01).use(), pytest.raises(Unavailable):
            fs.cat("main/disk")
        assert not patient.done()
        proceed.set()
        assert patient.result(60) == DISK


def test_a_reader_that_is_opened_while_the_file_system_closes_is_closed(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FileCache(tmp_path / "own") as cache, SnapshotLoader(cache, saved.cas) as loader:
        fs = SnapshotFileSystem(loader=loader, configuration_hash="conf", skip_instance_cache=True)
        read_snapshot, readers = loader.read_snapshot, []

        def closing(*args: Any, **kwargs: Any) -> Any:
            readers.append(read_snapshot(*args, **kwargs))
            fs.close()
            return readers[-1]

        monkeypatch.setattr(loader, "read_snapshot", closing)
        with pytest.raises(FailedPrecondition, match="closed"):
            fs.cat("main/disk")
        with pytest.raises(FailedPrecondition, match="closed"):
            readers[0].read_at("disk", 0, 1)


def test_a_cache_that_is_slow_to_open_holds_up_no_other(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, proceed = threading.Event(), threading.Event()

    class Slow(FileCache):
        def __init__(self, root: Any, **options: Any) -> None:
            if Path(root).name == "slow":
                begun.set()
                assert proceed.wait(60)
            super().__init__(root, **options)

    monkeypatch.setattr("snaploader.fsspec.FileCache", Slow)
    slow, quick = make(file_cache=str(tmp_path / "slow")), make(file_cache=str(tmp_path / "quick"))
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(slow.cat, "main/disk")
        assert begun.wait(60)
        try:
            assert pool.submit(quick.cat, "main/disk").result(60) == DISK
        finally:
            proceed.set()
        assert waiting.result(60) == DISK
