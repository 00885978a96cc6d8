"""What others do with the file system: pandas reads a table, zarr a part of an array, and only its chunks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fsspec", reason="fsspec is missing: install snaploader[fsspec]")

from snaploader import DirectorySource, FileCache, NotFound, SnapshotLoader, SnapshotTask
from snaploader.fsspec import SnapshotFileSystem
from snaploader.testing import FakeCAS

CHUNK = 4096


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory to fill and save."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def options(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Storage options of another host than the one that saves."""
    yield {"file_cache": str(tmp_path / "cache"), "remote_cache": FakeCAS(), "configuration_hash": "conf"}
    for fs in [*SnapshotFileSystem._cache.values()]:
        fs.close()
    SnapshotFileSystem.clear_instance_cache()


def save(data: Path, cas: FakeCAS) -> None:
    with FileCache(data.parent / "saving") as cache, SnapshotLoader(cache, cas) as loader:
        key_set = loader.snapshot_key_set(SnapshotTask.from_mapping((), {"GIT_BRANCH": "main"}), "conf")
        source = DirectorySource(data, chunk_threshold_bytes=2 * CHUNK)
        loader.cache_snapshot(key_set.write_key, directories={"data": source}, chunk_size=CHUNK)
    cas.reads.clear()


def test_pandas_reads_a_table(data: Path, options: dict[str, Any]) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is missing: install snaploader[dev]")
    table = pandas.DataFrame({"name": ["a", "b", "c"], "size": [1, 2, 3]})
    table.to_csv(data / "table.csv.gz", index=False)
    table.to_json(data / "table.json")
    save(data, options["remote_cache"])
    read = pandas.read_csv("snap://main/data/table.csv.gz", storage_options=options)
    pandas.testing.assert_frame_equal(read, table)
    read = pandas.read_json("snap://main/data/table.json", storage_options=options)
    pandas.testing.assert_frame_equal(read, table)


def test_pandas_reads_some_rows_of_a_big_table_without_fetching_it_all(
    data: Path, options: dict[str, Any]
) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is missing: install snaploader[dev]")
    pandas.DataFrame({"row": range(500_000)}).to_csv(data / "table.csv", index=False)
    cas = options["remote_cache"]
    save(data, cas)
    read = pandas.read_csv("snap://main/data/table.csv", nrows=3, storage_options=options)
    assert read["row"].tolist() == [0, 1, 2]
    assert cas.reads.total() < (data / "table.csv").stat().st_size // CHUNK // 4


# zarr keeps the thread of its event loop.
@pytest.mark.may_leak("zarr's event loop runs on")
def test_zarr_reads_a_part_of_an_array_from_its_chunks_alone(data: Path, options: dict[str, Any]) -> None:
    zarr = pytest.importorskip("zarr", reason="zarr is missing: install snaploader[dev]")
    values = np.random.default_rng(1).integers(0, 1 << 30, (40, 40))
    zarr.create_array(store=data / "array", data=values, chunks=(10, 10))
    cas = options["remote_cache"]
    save(data, cas)
    array = zarr.open_array("snap://main/data/array", mode="r", storage_options=options)
    before = cas.reads.total()
    assert (array[12:18, 0:20] == values[12:18, 0:20]).all()
    assert cas.reads.total() - before == 2
    assert (array[:] == values).all()


@pytest.mark.may_leak("zarr's event loop runs on")
def test_zarr_reads_no_zeros_where_content_was_lost(data: Path, options: dict[str, Any]) -> None:
    zarr = pytest.importorskip("zarr", reason="zarr is missing: install snaploader[dev]")
    zarr.create_array(store=data / "array", data=np.ones((20, 20)), chunks=(10, 10))
    cas = options["remote_cache"]
    save(data, cas)
    array = zarr.open_array("snap://main/data/array", mode="r", storage_options=options)
    cas.blobs.clear()
    with pytest.raises(NotFound, match="lost content"):
        array[:]


@pytest.mark.may_leak("zarr's event loop runs on")
def test_zarr_reads_no_zeros_where_the_snapshot_is_gone(data: Path, options: dict[str, Any]) -> None:
    zarr = pytest.importorskip("zarr", reason="zarr is missing: install snaploader[dev]")
    zarr.create_array(store=data / "array", data=np.ones((20, 20)), chunks=(10, 10))
    cas = options["remote_cache"]
    save(data, cas)
    array = zarr.open_array("snap://main/data/array", mode="r", storage_options=options)
    cas.action_results.clear()
    SnapshotFileSystem(**options).close()  # as in another process, which has found nothing yet
    with pytest.raises(NotFound, match="no snapshot"):
        array[:]
