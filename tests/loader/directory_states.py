"""Directories for tests: made, changed at random, and compared with all that is kept of them."""

from __future__ import annotations

import os
import random
import shutil
import stat
from pathlib import Path
from typing import Any

from loader_hosts import CHUNK, CONFIGURATION, Host

from snaploader import DirectorySource, SaveResult, Snapshot
from snaploader.keys import SnapshotKey
from snaploader.loader import SavedDirectory

BIG = 3 * CHUNK
"""Files of this size or more are kept in chunks of CHUNK bytes."""

OLD_NS = 1_600_000_000 * 10**9


def fill(root: Path, seed: int = 0) -> Path:
    """A directory with everything in it that is kept."""
    chance = random.Random(seed)
    (root / "etc/conf.d").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "no-entry").mkdir(0o500)
    (root / "plain").write_bytes(chance.randbytes(100))
    (root / "nothing").touch()
    (root / "etc/script").write_bytes(b"#!/bin/sh\n" + chance.randbytes(10))
    (root / "etc/script").chmod(0o755)
    (root / "etc/secret").write_bytes(chance.randbytes(10))
    (root / "etc/secret").chmod(0o400)
    (root / "etc/conf.d/ünïcode name\t\n").write_bytes(b"x")
    (root / "twin").write_bytes((root / "plain").read_bytes())
    write_sparse(root / "disk", [chance.randbytes(CHUNK), None, None, chance.randbytes(CHUNK), b"tail"])
    (root / "disk").chmod(0o600)
    (root / "to-file").symlink_to("plain")
    (root / "to-nowhere").symlink_to("../../nowhere/at all")
    (root / "to-root").symlink_to("/")
    (root / "etc/up").symlink_to("..")
    (root / "sticky").mkdir()
    (root / "sticky").chmod(0o1777)
    for number, path in enumerate(sorted(root.rglob("*"), key=lambda path: -len(path.parts))):
        set_time(path, OLD_NS + number * 1_000_000_007)
    set_time(root, OLD_NS - 1)
    return root


def write_sparse(path: Path, chunks: list[bytes | None]) -> None:
    """A file of chunks; None is a hole."""
    with path.open("wb") as file:
        for number, chunk in enumerate(chunks):
            if chunk is not None:
                os.pwrite(file.fileno(), chunk, number * CHUNK)
        size = sum(CHUNK if chunk is None else len(chunk) for chunk in chunks)
        file.truncate(size)


def set_time(path: Path, mtime_ns: int) -> None:
    os.utime(path, ns=(mtime_ns, mtime_ns), follow_symlinks=False)


def state_of(root: Path, *, times: bool = True) -> dict[str, Any]:
    """All that is kept of a directory: kinds, modes, times, targets and content, by relative path."""
    found: dict[str, Any] = {}
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        mtime = status.st_mtime_ns if times else 0
        name = str(path.relative_to(root))
        if stat.S_ISLNK(status.st_mode):
            found[name] = ("symlink", os.readlink(path), mtime)
        elif stat.S_ISDIR(status.st_mode):
            found[name] = ("directory", stat.S_IMODE(status.st_mode), mtime)
        elif stat.S_ISREG(status.st_mode):
            found[name] = ("file", stat.S_IMODE(status.st_mode), mtime, path.read_bytes())
    return found


def save_directory(host: Host, path: Path, **kwargs: Any) -> SaveResult:
    """Save `path` as the directory "home", under an id only; arguments go to the source and to the save."""
    own = {name: kwargs.pop(name) for name in ("exclude", "index") if name in kwargs}
    threshold = kwargs.pop("chunk_threshold_bytes", BIG)
    source = DirectorySource(path, chunk_threshold_bytes=threshold, **own)
    return host.loader.cache_snapshot(
        kwargs.pop("key", SnapshotKey()),
        directories={"home": source},
        vm_configuration=CONFIGURATION,
        chunk_size=kwargs.pop("chunk_size", CHUNK),
        **kwargs,
    )


def saved(result: SaveResult) -> SavedDirectory:
    """What a save says of its only directory."""
    (directory,) = result.directories
    return directory


def find(host: Host, result: SaveResult, policy: str = "local-first") -> Snapshot:
    return host.loader.get_snapshot_by_id(result.snapshot_id, read_policy=policy)


class Changes:
    """Changes a directory at random. Every file written gets a time of its own, as on a real clock."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._clock_ns = OLD_NS
        self._chance = random.Random()

    def make(self, name: str, seed: int) -> None:
        """Make the change of this name, if there is anything to change."""
        self._chance = random.Random(seed)
        getattr(self, f"_{name}")()

    def _write(self) -> None:
        path = self._new()
        if not path.is_symlink() and not path.is_dir():
            path.write_bytes(self._chance.randbytes(self._chance.choice([0, 10, 3000, BIG, BIG + 5])))
            self._stamp(path)

    def _append(self) -> None:
        for path in self._some_file():
            with path.open("ab") as file:
                file.write(self._chance.randbytes(5))
            self._stamp(path)

    def _overwrite(self) -> None:
        for path in self._some_file():
            with path.open("r+b") as file:
                file.seek(CHUNK)
                file.write(self._chance.randbytes(3))
            self._stamp(path)

    def _touch(self) -> None:
        for path in self._some_file():
            self._stamp(path)

    def _remove(self) -> None:
        for path in self._some_file():
            path.unlink()

    def _chmod(self) -> None:
        for path in self._some_file():
            path.chmod(self._chance.choice([0o600, 0o644, 0o755]))

    def _rename(self) -> None:
        for path in self._some_file():
            path.rename(self._absent())

    def _swap(self) -> None:
        for one in self._some_file():
            for other in self._some_file():
                between = self._absent()
                one.rename(between)
                if other != one:
                    other.rename(one)
                between.rename(other)

    def _mkdir(self) -> None:
        self._absent().mkdir()

    def _symlink(self) -> None:
        self._absent().symlink_to(self._chance.choice(["x", "..", "/etc/passwd"]))

    def _rmtree(self) -> None:
        folders = self._folders()[1:]
        if folders:
            shutil.rmtree(self._chance.choice(folders))

    def _new(self) -> Path:
        return self._chance.choice(self._folders()) / f"new-{self._chance.randrange(7)}"

    def _absent(self) -> Path:
        path = self._new()
        while os.path.lexists(path):
            path = path.with_name(f"{path.name}+")
        return path

    def _folders(self) -> list[Path]:
        below = sorted(path for path in self._root.rglob("*") if path.is_dir() and not path.is_symlink())
        return [self._root, *below]

    def _some_file(self) -> list[Path]:
        """One regular file, or none where there is none."""
        files = sorted(path for path in self._root.rglob("*") if path.is_file() and not path.is_symlink())
        return [self._chance.choice(files)] if files else []

    def _stamp(self, path: Path) -> None:
        self._clock_ns += 1
        set_time(path, self._clock_ns)


CHANGES = (
    "append",
    "chmod",
    "mkdir",
    "overwrite",
    "remove",
    "rename",
    "rmtree",
    "swap",
    "symlink",
    "touch",
    "write",
)
"""The names of changes."""
