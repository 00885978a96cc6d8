"""A real ext4 image, made from files of this machine."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from snaploader.cli.demo.ext4 import make_image
from snaploader.errors import FailedPrecondition, translate_os_errors

MAX_FILE_BYTES = 8 << 20
"""Bigger files are left out, so that the image holds many."""

MAX_CHOSEN_BYTES = 512 << 10
"""Nor is a bigger one the file that the demo reads."""

_SAFE_NAME = re.compile(r"[A-Za-z0-9._+-]{1,100}")


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
