"""What e2fsprogs (mke2fs, debugfs, e2fsck) say about an image. Their output in English is parsed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from snaploader.errors import FailedPrecondition, Internal

TOOLS = ("mke2fs", "debugfs", "e2fsck")
TIMEOUT_S = 60

_IMAP = re.compile(r"located at block (\d+)")
_BLOCK_SIZE = re.compile(r"^Block size:\s+(\d+)$", re.MULTILINE)
_BLOCK_COUNT = re.compile(r"^Block count:\s+(\d+)$", re.MULTILINE)
_BLOCKS_PER_GROUP = re.compile(r"^Blocks per group:\s+(\d+)$", re.MULTILINE)
_FIRST_BLOCK = re.compile(r"^First block:\s+(\d+)$", re.MULTILINE)
_DESCRIPTOR_SIZE = re.compile(r"^Group descriptor size:\s+(\d+)$", re.MULTILINE)


def require_tools() -> None:
    """FailedPrecondition, naming the package, when a tool is missing."""
    missing = [tool for tool in TOOLS if _find(tool) is None]
    if missing:
        raise FailedPrecondition(
            f"{', '.join(missing)} not found: install e2fsprogs (on Debian: apt-get install e2fsprogs)"
        )


def make_image(path: Path, tree: Path, size: int) -> None:
    """A new ext4 image of `size` bytes that holds the files under `tree`."""
    _run("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-d", str(tree), str(path), f"{size >> 10}k")


def is_clean(path: Path) -> tuple[bool, str]:
    """Whether a full, read-only check finds nothing to repair; and what it said last."""
    done = _start("e2fsck", "-fn", str(path))
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else ""


def read_file(image: Path, name: str) -> bytes:
    """The content of a file in an image."""
    return _debugfs(image, f"cat {name}")


def file_blocks(image: Path, name: str) -> list[int]:
    """The blocks a file or folder of an image lies in."""
    return [int(number) for number in _debugfs(image, f"blocks {name}").split()]


def inode_block(image: Path, name: str) -> int:
    """The block that the inode of a file or folder lies in."""
    return _number(_IMAP, _debugfs(image, f"imap {name}").decode(errors="replace"))


def first_block(image: Path, name: str) -> int:
    """The block that a file begins in."""
    return int(_debugfs(image, f"bmap {name} 0"))


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the descriptors of an image lie."""

    block_size: int
    descriptor_blocks: range
    """The superblock, and the group descriptors behind it."""


def layout(image: Path) -> Layout:
    """The layout that the superblock tells."""
    text = _debugfs(image, "stats -h").decode(errors="replace")
    block_size = _number(_BLOCK_SIZE, text)
    first = _number(_FIRST_BLOCK, text)
    groups = -(-(_number(_BLOCK_COUNT, text) - first) // _number(_BLOCKS_PER_GROUP, text))
    descriptor_size = _DESCRIPTOR_SIZE.search(text)
    table_bytes = groups * (int(descriptor_size[1]) if descriptor_size else 32)
    return Layout(block_size, range(first, first + 1 - (-table_bytes // block_size)))


def _number(pattern: re.Pattern[str], text: str) -> int:
    match = pattern.search(text)
    if match is None:
        raise Internal(f"debugfs gave an unexpected answer: {text.strip()[:200]!r}")
    return int(match[1])


def _debugfs(image: Path, request: str) -> bytes:
    # -c leaves the block and inode bitmaps unread, which reading a file does not need.
    done = _start("debugfs", "-c", "-R", request, str(image))
    complaints = [
        line
        for line in done.stderr.decode(errors="replace").splitlines()
        if line and not line.startswith("debugfs ") and "catastrophic mode" not in line
    ]
    if done.returncode or complaints:
        raise Internal(f"debugfs could not do {request!r} on {image.name}: {'; '.join(complaints)}")
    return done.stdout


def _run(tool: str, *arguments: str) -> None:
    done = _start(tool, *arguments)
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise FailedPrecondition(f"{tool} failed with exit code {done.returncode}: {said[-500:]}")


def _start(tool: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    path = _find(tool)
    if path is None:
        require_tools()
    assert path is not None
    environment = {**os.environ, "LC_ALL": "C", "DEBUGFS_PAGER": "cat"}
    try:
        return subprocess.run(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Internal(f"{tool} took more than {TIMEOUT_S} s") from error


def _find(tool: str) -> str | None:
    # These tools lie where the PATH of ordinary users often does not lead.
    return shutil.which(tool, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
