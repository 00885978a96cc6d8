"""Users who share a folder that all of them may write to, while what each makes is only theirs to write."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filecache_helpers import child, leftovers

from snaploader.filecache import FileCache

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users"),
]

FIRST, SECOND = 54321, 54322
"""User ids; no user needs to have them."""

PROGRAM = """
import os, sys, tempfile
from filecache_helpers import blob, key, put
from snaploader.filecache import FileCache

# The interpreter may lie where only root may read: everything is imported by using it once before.
with tempfile.TemporaryDirectory() as folder, FileCache(folder) as cache:
    cache.lease([put(cache, "b", 100)]).release()
    cache.prune()

root, user, mode = sys.argv[1], int(sys.argv[2]), int(sys.argv[3], 8)
os.umask(0o077)
os.setgroups([])
os.setgid(user)
os.setuid(user)
with FileCache(root, cache_mode=mode) as cache:
    print("open", flush=True)
    for line in sys.stdin:
        print(eval(line), flush=True)
"""


class OtherUser:
    """A cache that another user's process has open."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid
        assert process.stdout.readline() == "open\n"

    def does(self, expression: str) -> str:
        """What an expression gives there."""
        self._process.stdin.write(f"{expression}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().rstrip("\n")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdin = None
        self._process.wait(300)


@contextmanager
def opened(root: Path, user: int, mode: str = "0777") -> Iterator[OtherUser]:
    with child(PROGRAM, root, str(user), mode) as process:
        other = OtherUser(process)
        yield other
        other.close()


@pytest.fixture
def root() -> Iterator[Path]:
    """A cache folder where all may write, with one blob. Not below tmp_path, which is only for its owner."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        with opened(Path(folder, "cache"), FIRST) as first:
            first.does("put(cache, 'a', 100)")
        yield Path(folder, "cache")


def session_files(root: Path, user: OtherUser) -> list[Path]:
    """The staging folder and the lock of an open cache."""
    return sorted(Path(root, "v1", "tmp").glob(f"{user.pid}-*"))


def test_open_cache_of_one_user_hinders_no_other_and_its_leases_hold(root):
    with opened(root, FIRST) as first:
        first.does("cache.lease([blob('a', 100)[0]])")
        with opened(root, SECOND) as second:
            assert second.does("cache.prune()") == "4096"
            first.kill()
            assert second.does("cache.prune()") == "0"
    assert leftovers(root) == []


def test_session_whose_lock_may_not_be_opened_counts_as_alive(root):
    with opened(root, FIRST) as first:
        staging, lock = session_files(root, first)
        lock.chmod(0o600)
        first.kill()
        with opened(root, SECOND):
            assert staging.exists()
            assert lock.exists()
        with opened(root, FIRST):
            assert not staging.exists()
            assert not lock.exists()
    assert leftovers(root) == []


def test_what_another_user_may_not_remove_stays_findable_for_the_owner(root):
    with opened(root, FIRST) as first:
        staging, lock = session_files(root, first)
        Path(staging, "staged").write_bytes(b"half")
        staging.chmod(0o755)
        first.kill()
        with opened(root, SECOND):
            assert Path(staging, "staged").exists()
            assert lock.exists()
        with opened(root, FIRST):
            assert not staging.exists()
            assert not lock.exists()
    assert leftovers(root) == []


def test_lease_of_a_dead_session_in_a_folder_with_the_sticky_bit_hinders_nobody(root):
    os.chmod(root / "v1" / "leases", 0o1777)
    with opened(root, FIRST) as first:
        first.does("cache.lease([blob('a', 100)[0]])")
        first.kill()
        with opened(root, SECOND) as second:
            assert second.does("cache.prune()") == "0"
    with FileCache(root, cache_mode=0o777):
        pass
    assert leftovers(root) == []
