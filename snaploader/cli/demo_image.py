"""The disk image of the demo: files of this machine in ext4, and a window on an image that is not there yet.

What is in an image e2fsprogs says (mke2fs, debugfs, e2fsck), whose output in English is parsed. debugfs
opens a file, not a store. So the demo gives it a window: a sparse file as long as the image, into which
blocks are copied from the lazy store just before debugfs needs them. Which ones it needs, debugfs itself says
from those that are there already: the superblock tells where the descriptors lie, the descriptors where an
inode lies, the inode where its folder lies, and so on down the path. Nothing is known beforehand, and what
debugfs reads in the end has all come through the store.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from cow import COWStore
from snaploader.errors import FailedPrecondition, Internal, translate_os_errors

TOOLS = ("mke2fs", "debugfs", "e2fsck")
TIMEOUT_S = 60

MAX_FILE_BYTES = 8 << 20
"""Bigger files are left out, so that the image holds many."""

MAX_CHOSEN_BYTES = 512 << 10
"""Nor is a bigger one the file that the demo reads."""

_SAFE_NAME = re.compile(r"[A-Za-z0-9._+-]{1,100}")

SUPERBLOCK_BYTES = 4096
"""The superblock lies 1024 bytes into the image and is 1024 bytes long, whatever the block size."""


def build_image(path: Path, size: int, data_bytes: int, scratch: Path) -> tuple[str, Path]:
    """Make an ext4 image of about `data_bytes` of this machine's files.

    Returns the path, inside the image, of a file worth reading, and where its original lies.
    """
    tree = scratch / "tree"
    copied = _copy_files(tree, data_bytes)
    make_image(path, tree, size)
    # The largest of moderate size: more than one block, far less than the image. Text, if there is some.
    moderate = {name: count for name, count in copied.items() if count <= MAX_CHOSEN_BYTES}
    chosen = max(moderate, key=lambda name: (name.endswith(".py"), moderate[name], name))
    return f"/{chosen}", tree / chosen


def _copy_files(tree: Path, budget: int) -> dict[str, int]:
    """Copy files under `tree` until `budget` bytes are spent; their sizes by relative path."""
    copied: dict[str, int] = {}
    spent = 0
    with translate_os_errors(f"cannot copy files of this machine to {str(tree)!r}"):
        for source, name, size in _candidates():
            if spent + size > budget:
                break
            target = tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(source, target)
            except PermissionError:
                continue
            copied[name] = size
            spent += size
    if not any(size <= MAX_CHOSEN_BYTES for size in copied.values()):
        raise FailedPrecondition(
            "found no files on this machine to make an image from, or --data is too small"
        )
    return copied


def _candidates() -> Iterator[tuple[Path, str, int]]:
    """Readable files, in a fixed order: Python's library, which is there for sure, then the system's."""
    seen: set[str] = set()
    for root in (sysconfig.get_path("stdlib"), "/usr/bin", "/usr/lib", "/usr/share"):
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if _SAFE_NAME.fullmatch(name))
            for name in sorted(names):
                path = Path(folder, name)
                relative = str(path.relative_to(path.anchor))
                if relative in seen or not _SAFE_NAME.fullmatch(name):
                    continue
                seen.add(relative)
                try:
                    status = path.lstat()
                except OSError:
                    continue
                if stat.S_ISREG(status.st_mode) and 0 < status.st_size <= MAX_FILE_BYTES:
                    yield path, relative, status.st_size


class Window:
    """A sparse file with those blocks of a store that were needed."""

    def __init__(self, store: COWStore, path: Path) -> None:
        self._store = store
        self._path = path
        with path.open("xb") as file:
            file.truncate(store.size)
        self._copy(0, SUPERBLOCK_BYTES)
        text = _debugfs(path, "stats -h").decode(errors="replace")
        self.block_size = _number("Block size:", text)
        first = _number("First block:", text)
        groups = -(-(_number("Block count:", text) - first) // _number("Blocks per group:", text))
        table_bytes = groups * (_number("Group descriptor size:", text) if "descriptor size:" in text else 32)
        self._present: set[int] = set()
        # The superblock, and the group descriptors behind it.
        self.load(range(first, first + 1 - (-table_bytes // self.block_size)))

    @property
    def loaded_bytes(self) -> int:
        """What was copied from the store so far."""
        return len(self._present) * self.block_size

    def load(self, blocks: Iterable[int]) -> None:
        for block in sorted(set(blocks) - self._present):
            self._copy(block * self.block_size, self.block_size)
            self._present.add(block)

    def read_file(self, name: str) -> bytes:
        self._walk(name)
        return read_file(self._path, name)

    def offset(self, name: str) -> int:
        self._walk(name)
        return int(_debugfs(self._path, f"bmap {name} 0")) * self.block_size

    def _walk(self, name: str) -> None:
        """Load what leads to a file, from the root folder on, and the file."""
        parts = name.strip("/").split("/")
        for depth in range(len(parts) + 1):
            place = "/" + "/".join(parts[:depth])
            self.load([inode_block(self._path, place)])
            self.load(map(int, _debugfs(self._path, f"blocks {place}").split()))

    def _copy(self, offset: int, size: int) -> None:
        data = self._store.read_at(offset, min(size, self._store.size - offset))
        with self._path.open("r+b") as file:
            os.pwrite(file.fileno(), data, offset)


def require_tools() -> None:
    """FailedPrecondition, naming the package, when a tool is missing."""
    missing = [tool for tool in TOOLS if _find(tool) is None]
    if missing:
        raise FailedPrecondition(
            f"{', '.join(missing)} not found: install e2fsprogs (on Debian: apt-get install e2fsprogs)"
        )


def make_image(path: Path, tree: Path, size: int) -> None:
    """A new ext4 image of `size` bytes that holds the files under `tree`."""
    done = _start(
        *("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-d", str(tree), str(path), f"{size >> 10}k")
    )
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise FailedPrecondition(f"mke2fs failed with exit code {done.returncode}: {said[-500:]}")


def is_clean(path: Path) -> tuple[bool, str]:
    """Whether a full, read-only check finds nothing to repair; and what it said last."""
    done = _start("e2fsck", "-fn", str(path))
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else ""


def read_file(image: Path, name: str) -> bytes:
    return _debugfs(image, f"cat {name}")


def inode_block(image: Path, name: str) -> int:
    return _number("located at block", _debugfs(image, f"imap {name}").decode(errors="replace"))


def _number(label: str, text: str) -> int:
    match = re.search(rf"^\s*{label}\s+(\d+)", text, re.MULTILINE)
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


def _start(tool: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "LC_ALL": "C", "DEBUGFS_PAGER": "cat"}
    try:
        return subprocess.run(
            [_find(tool) or tool, *arguments],
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
