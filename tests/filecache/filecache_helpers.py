"""Shared by the tests of the file cache."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snaploader.digest import Digest, DigestFunction
from snaploader.filecache import FileCache

SHA256 = DigestFunction.SHA256
BLAKE3 = DigestFunction.BLAKE3
HERE = Path(__file__).parent


def blob(seed: int | str, size: int = 5000, function: DigestFunction = SHA256) -> tuple[Digest, bytes]:
    """Random bytes that are the same in every run, and their digest."""
    data = random.Random(seed).randbytes(size)
    return Digest.of(data, function), data


def put(cache: FileCache, seed: int | str, size: int = 5000) -> Digest:
    """Add the blob of a seed."""
    digest, data = blob(seed, size)
    cache.put_verified(digest, data)
    return digest


def key(name: str) -> str:
    """A key for refs."""
    return hashlib.sha256(name.encode()).hexdigest()


def blob_file(cache: FileCache, digest: Digest) -> Path:
    """Where the layout says that a blob is; not by asking the cache, which would use it."""
    group = cache.group_id or "_default"
    function = digest.function.name.lower()
    base = Path(cache.root, "v1", "groups", group, "blobs", function)
    return base / digest.hash[:2] / digest.hash[2:]


def damage(path: Path, content: bytes) -> None:
    """Overwrite a read-only file in place."""
    os.chmod(path, 0o600)
    path.write_bytes(content)
    os.chmod(path, 0o400)


def tracked_directory(root: str | os.PathLike[str], name: str, group: str = "_default") -> Path:
    """Put a tracked directory into a cache folder, as earlier releases did."""
    entry = Path(root, "v1/groups", group, "trees", key(name)[:2], key(name)[2:])
    (entry / "data/sub").mkdir(parents=True)
    (entry / "data/sub/file").write_bytes(b"x" * 5000)
    (entry / "data/link").symlink_to("/")
    (entry / "size").write_text("12288")
    (entry / "lock").touch(0o600)
    return entry


def disk_bytes_below(root: str | os.PathLike[str], *folders: str) -> int:
    """Disk blocks of all blob and ref files, counted independently."""
    total = 0
    for group in Path(root, "v1", "groups").iterdir():
        for folder in folders or ("blobs", "refs"):
            for path in (group / folder).rglob("*"):
                if path.is_file():
                    total += path.stat().st_blocks * 512
    return total


def leftovers(root: str | os.PathLike[str]) -> list[str]:
    """What lies in the folders that are empty while no cache is open."""
    base = Path(root, "v1")
    return sorted(str(path) for name in ("tmp", "trash", "leases") for path in (base / name).iterdir())


def open_without_o_tmpfile(path, flags, *rest, _open=os.open, **options):
    """What os.open does on a file system that knows no O_TMPFILE."""
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    return _open(path, flags, *rest, **options)


@contextmanager
def child(program: str, *arguments: str | os.PathLike[str]) -> Iterator[subprocess.Popen[str]]:
    """A Python process that talks on stdin and stdout; killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(os.fspath, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
