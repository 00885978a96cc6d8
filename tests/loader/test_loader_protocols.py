"""The protocols say what the classes do, and a loader works over a file cache that is none."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Self

import pytest

from snaploader import FileCacheProtocol, Loader, SnapshotKey, SnapshotLoader
from snaploader.digest import Buffer, Digest, DigestFunction, empty_digest
from snaploader.errors import NotFound
from snaploader.filecache import FileCache
from snaploader.testing import FakeCAS

IMAGE = b"".join(bytes([number]) * 65_536 for number in range(1, 9))


class NoLease:
    """What a cache that evicts nothing gives for a lease."""

    def release(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Writer(NoLease):
    def __init__(self, cache: DictionaryCache, digest: Digest) -> None:
        self._cache, self._digest, self._data = cache, digest, b""

    def write(self, data: Buffer) -> None:
        self._data += bytes(data)

    def commit(self) -> bool:
        return self._cache.put_verified(self._digest, self._data)


class DictionaryCache:
    """A file cache in a dictionary, as somebody would write it who needs no disk."""

    root = "/nowhere"
    group_id = ""

    def __init__(self) -> None:
        self.blobs: dict[Digest, bytes] = {}
        self.kept: dict[str, bytes] = {}

    def find_missing(self, digests: Collection[Digest], **_: object) -> set[Digest]:
        return {one for one in digests if one not in self.blobs and one != empty_digest(one.function)}

    def read(self, digest: Digest, **_: object) -> bytes:
        if digest not in self.blobs:
            raise NotFound("no such blob")
        return self.blobs[digest]

    def open(self, digest: Digest, **_: object) -> int:
        data = self.read(digest)
        fd = os.memfd_create("blob")
        os.pwrite(fd, data, 0)
        return fd

    def put_verified(self, digest: Digest, data: Buffer, **_: object) -> bool:
        is_new = digest not in self.blobs
        self.blobs[digest] = bytes(data)
        return is_new

    def put_file(self, digest: Digest, path: str | os.PathLike[str], **_: object) -> bool:
        return self.put_verified(digest, Path(path).read_bytes())

    def find_private(self, digests: Iterable[Digest], **_: object) -> set[Digest]:
        return set()

    def add_file(
        self, path: str | os.PathLike[str], function: DigestFunction = DigestFunction.SHA256, **_: object
    ) -> tuple[Digest, bool]:
        data = Path(path).read_bytes()
        digest = Digest.of(data, function)
        return digest, self.put_verified(digest, data)

    def write(self, digest: Digest, source: Any, **_: object) -> None:
        self.put_verified(digest, Path(source).read_bytes() if isinstance(source, str) else source)

    def read_to(self, digest: Digest, write: Callable[[Buffer], object], **_: object) -> None:
        write(self.read(digest))

    def read_many(self, digests: Iterable[Digest], sink: Any, **_: object) -> None:
        for digest in digests:
            sink(digest, self.read(digest))

    def materialize(self, digest: Digest, destination: str | os.PathLike[str], **options: Any) -> None:
        Path(destination).write_bytes(self.read(digest))
        os.chmod(destination, options["mode"])

    def writer(self, digest: Digest, **_: object) -> Writer:
        return Writer(self, digest)

    def lease(self, digests: Iterable[Digest], **_: object) -> NoLease:
        return NoLease()

    def get_ref(self, key: str, **_: object) -> bytes:
        if key not in self.kept:
            raise NotFound("no such ref")
        return self.kept[key]

    def put_ref(self, key: str, data: bytes, *, overwrite: bool = True, **_: object) -> bool:
        if key in self.kept and not overwrite:
            return False
        self.kept[key] = data
        return True

    def delete_ref(self, key: str, **_: object) -> bool:
        return self.kept.pop(key, None) is not None


def members(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def parameters(kind: type, name: str) -> list[tuple[str, object, object]]:
    signature = inspect.signature(getattr(kind, name))
    return [(one.name, one.kind, one.default) for one in signature.parameters.values()]


def test_the_loader_protocol_names_all_that_a_loader_does() -> None:
    assert members(Loader) == {
        name for name in members(SnapshotLoader) if inspect.isfunction(getattr(SnapshotLoader, name))
    }


@pytest.mark.parametrize(("protocol", "kind"), [(Loader, SnapshotLoader), (FileCacheProtocol, FileCache)])
def test_methods_have_the_parameters_of_the_class(protocol: type, kind: type) -> None:
    for name in members(protocol):
        if not isinstance(vars(protocol)[name], property):
            assert parameters(protocol, name) == parameters(kind, name), name


@pytest.mark.parametrize("remote", [None, FakeCAS()], ids=["alone", "with a remote store"])
def test_a_loader_over_another_file_cache_saves_finds_unpacks_and_restores(
    tmp_path: Path, remote: FakeCAS | None
) -> None:
    (tmp_path / "disk").write_bytes(IMAGE)
    (tmp_path / "small").write_bytes(b"small")
    cache = DictionaryCache()
    with SnapshotLoader(cache, remote) as loader:  # type: ignore[arg-type]
        saved = loader.cache_snapshot(
            SnapshotKey(ref="main"),
            chunked_files={"disk": tmp_path / "disk"},
            files={"small": tmp_path / "small"},
            directories={},
            chunk_size=65_536,
        )
        if remote is not None:
            cache.blobs.clear()
        snapshot = loader.get_snapshot_by_id(saved.snapshot_id)
        with loader.unpack_snapshot(snapshot, tmp_path / "unpacked") as unpacked:
            disk = unpacked.chunked_files["disk"]
            assert disk.read_at(65_536, 3) == b"\x02\x02\x02"
            disk.write_at(0, b"new")
            again = loader.cache_snapshot(SnapshotKey(ref="main"), chunked_files={"disk": disk})
        restored = loader.restore_snapshot(
            loader.get_snapshot_by_id(again.snapshot_id), tmp_path / "restored"
        )
    assert restored.files["disk"].read_bytes() == b"new" + IMAGE[3:]
    assert (tmp_path / "unpacked" / "small").read_bytes() == b"small"
