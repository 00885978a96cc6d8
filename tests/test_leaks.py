"""The leak check itself: each kind of resource is seen while it is held, and not after."""

from __future__ import annotations

import mmap
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from leaks import Resources, wait_for_none


def new_since(before: Resources, folder: Path) -> list[str]:
    return wait_for_none(lambda: Resources.now(str(folder)).beyond(before))


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leaks.GRACE_S", 0.0)


def test_a_running_thread_is_a_leak(tmp_path: Path) -> None:
    before = Resources.now(str(tmp_path))
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="forgotten")
    thread.start()
    try:
        assert new_since(before, tmp_path) == ["thread forgotten"]
    finally:
        stop.set()
        thread.join()
    assert new_since(before, tmp_path) == []


def test_an_open_file_is_a_leak(tmp_path: Path) -> None:
    before = Resources.now(str(tmp_path))
    with open(tmp_path / "file", "wb") as file:
        assert new_since(before, tmp_path) == [f"descriptor {file.fileno()} of {tmp_path}/file"]
    assert new_since(before, tmp_path) == []


def test_a_mapped_file_is_a_leak_even_when_it_is_closed_and_removed(tmp_path: Path) -> None:
    before = Resources.now(str(tmp_path))
    path = tmp_path / "file"
    path.write_bytes(bytes(mmap.PAGESIZE))
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    path.unlink()
    with mapping:
        assert f"mapping of {path} (deleted)" in new_since(before, tmp_path)
    assert new_since(before, tmp_path) == []


def test_a_running_child_is_a_leak(tmp_path: Path) -> None:
    before = Resources.now(str(tmp_path))
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        assert any(f"child process {child.pid}" in leak for leak in new_since(before, tmp_path))
    assert new_since(before, tmp_path) == []
