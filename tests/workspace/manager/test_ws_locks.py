"""Locks of workspaces: exclusive between threads and processes, given up by the dead, waited for in time."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snaploader.errors import Cancelled, DeadlineExceeded, InvalidArgument
from snaploader.workspace.host import WorkspaceLocks

HOLD = """
import sys
from snaploader.workspace.host import WorkspaceLocks
held = WorkspaceLocks(sys.argv[1]).acquire("one")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def locks(tmp_path: Path) -> WorkspaceLocks:
    return WorkspaceLocks(tmp_path / "locks")


def test_a_held_lock_is_not_had_again_until_it_is_released(locks: WorkspaceLocks) -> None:
    held = locks.acquire("one")
    assert locks.try_acquire("one") is None
    held.release()
    again = locks.try_acquire("one")
    assert again is not None
    again.release()


def test_two_workspaces_do_not_wait_for_each_other(locks: WorkspaceLocks) -> None:
    one, two = locks.acquire("one"), locks.acquire("two", timeout_s=0)
    one.release()
    two.release()


def test_waiting_ends_at_its_deadline(locks: WorkspaceLocks) -> None:
    held = locks.acquire("one")
    with pytest.raises(DeadlineExceeded, match="'one'"):
        locks.acquire("one", timeout_s=0.02)
    held.release()


def test_waiting_can_be_called_off(locks: WorkspaceLocks) -> None:
    held, cancelled, failures = locks.acquire("one"), threading.Event(), []

    def wait() -> None:
        try:
            locks.acquire("one", cancelled=cancelled)
        except Cancelled as error:
            failures.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    cancelled.set()
    waiter.join(300)
    held.release()
    assert len(failures) == 1


def test_a_shared_lock_is_held_until_the_last_share_is_released(locks: WorkspaceLocks) -> None:
    held = locks.acquire("one")
    share = held.share()
    held.release()
    assert locks.try_acquire("one") is None
    share.release()
    with pytest.raises(Cancelled):
        held.share()
    locks.acquire("one", timeout_s=0).release()


def test_every_waiting_thread_gets_its_turn_alone(locks: WorkspaceLocks) -> None:
    inside, most, turns = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, turns
        held = locks.acquire("one", timeout_s=30)
        inside += 1
        most = max(most, inside)
        turns += 1
        inside -= 1
        held.release()

    threads = [threading.Thread(target=work) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, turns) == (1, 20)


def test_the_lock_of_a_killed_process_is_free(locks: WorkspaceLocks, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "locks")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        assert locks.try_acquire("one") is None
        child.kill()
        child.wait()
    held = locks.acquire("one", timeout_s=0)
    held.release()


def test_the_file_of_a_workspace_that_is_gone_can_be_removed_while_others_wait(
    locks: WorkspaceLocks, tmp_path: Path
) -> None:
    held, got = locks.acquire("one"), []
    waiter = threading.Thread(target=lambda: got.append(locks.acquire("one", timeout_s=30)))
    waiter.start()
    held.remove_file()
    held.release()
    waiter.join()
    assert locks.try_acquire("one") is None
    got[0].remove_file()
    got[0].release()
    assert os.listdir(tmp_path / "locks") == []


def test_a_lock_file_is_never_outside_its_folder(locks: WorkspaceLocks) -> None:
    with pytest.raises(InvalidArgument):
        locks.acquire("../one")


class Hosts:
    """Another host's lock: free or not."""

    def __init__(self, *, is_free: bool) -> None:
        self.is_free = is_free
        self.held = 0

    @contextlib.contextmanager
    def lock(
        self, workspace_id: str, *, wait_s: float | None, cancelled: threading.Event | None = None
    ) -> Iterator[bool]:
        self.held += self.is_free
        try:
            yield self.is_free
        finally:
            self.held -= self.is_free


def test_the_lock_between_hosts_is_held_as_long_as_the_host_s_own(tmp_path: Path) -> None:
    hosts = Hosts(is_free=True)
    held = WorkspaceLocks(tmp_path, hosts).acquire("one", timeout_s=1)
    assert hosts.held == 1
    held.release()
    assert hosts.held == 0


def test_a_lock_that_another_host_holds_is_not_had_and_leaves_the_host_s_own_free(tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceeded, match="another host"):
        WorkspaceLocks(tmp_path, Hosts(is_free=False)).acquire("one", timeout_s=0)
    WorkspaceLocks(tmp_path).acquire("one", timeout_s=0).release()


def fork_that_waits(in_child: Callable[[], object] = lambda: None) -> Iterator[None]:
    """A child that has all descriptors of this process, as long as the block is open."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(writer)
            in_child()
            os.read(reader, 1)
        finally:
            os._exit(0)
    os.close(reader)
    try:
        yield
    finally:
        os.close(writer)
        os.waitpid(pid, 0)


def test_a_child_that_was_forked_under_the_lock_does_not_keep_it(locks: WorkspaceLocks) -> None:
    held = locks.acquire("one")
    with contextlib.contextmanager(fork_that_waits)():
        held.release()
        again = locks.try_acquire("one")
        assert again is not None
        again.release()


def test_a_child_that_leaves_the_block_in_which_it_was_forked_takes_nobody_the_lock(
    locks: WorkspaceLocks,
) -> None:
    held = locks.acquire("one")
    with contextlib.contextmanager(fork_that_waits)(held.release):
        pass
    assert locks.try_acquire("one") is None
    held.release()
