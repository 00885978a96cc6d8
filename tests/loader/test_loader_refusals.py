"""What cannot be saved is refused with a typed error that names the file, and nothing is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loader_hosts import CHUNK, CONFIGURATION, HostFactory, image, task

from cow import COWStore
from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound


def test_one_store_twice_in_a_save_is_refused(make_host: HostFactory, tmp_path: Path) -> None:
    host = make_host("a")
    with COWStore(tmp_path / "store", size=4 * CHUNK, chunk_size=CHUNK) as store:
        store.write_at(0, b"data")
        with pytest.raises(FailedPrecondition, match=r"'(one|two)'"):
            host.save(chunked_files={"one": store, "two": store})
        assert host.save(chunked_files={"one": store}).saved_locally


def test_a_closed_store_is_refused(make_host: HostFactory, tmp_path: Path) -> None:
    store = COWStore(tmp_path / "store", size=4 * CHUNK, chunk_size=CHUNK)
    store.close()
    with pytest.raises(FailedPrecondition, match="'disk'"):
        make_host("a").save(chunked_files={"disk": store})


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(CHUNK // 2)


def test_a_chunked_file_that_is_truncated_meanwhile_is_refused(
    make_host: HostFactory, tmp_path: Path
) -> None:
    host = make_host("a")
    path = tmp_path / "disk"
    path.write_bytes(image(1))
    with pytest.raises(FailedPrecondition, match=r"was changed|cut short"):
        host.save(chunked_files={"disk": path}, progress=lambda _: truncate(path))
    with pytest.raises(NotFound):
        host.find()


def test_a_plain_file_that_is_truncated_meanwhile_is_refused(
    make_host: HostFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a")
    path = tmp_path / "kernel"
    path.write_bytes(image(1))
    add_file = host.cache.add_file

    def add_and_truncate(*args: Any) -> Any:
        added = add_file(*args)
        truncate(path)
        return added

    monkeypatch.setattr(host.cache, "add_file", add_and_truncate)
    with pytest.raises(FailedPrecondition, match="was changed"):
        host.save(files={"kernel": path})
    with pytest.raises(NotFound):
        host.find()


@pytest.mark.parametrize("chunk_size", [0, -CHUNK, 1, CHUNK + 1, 3 * CHUNK])
def test_an_impossible_chunk_size_is_refused(make_host: HostFactory, tmp_path: Path, chunk_size: int) -> None:
    host = make_host("a")
    (tmp_path / "disk").write_bytes(image(1))
    key = host.loader.snapshot_key_set(task(), "conf").write_key
    with pytest.raises(InvalidArgument, match="chunk size"):
        host.loader.cache_snapshot(
            key,
            chunked_files={"disk": tmp_path / "disk"},
            vm_configuration=CONFIGURATION,
            chunk_size=chunk_size,
        )
