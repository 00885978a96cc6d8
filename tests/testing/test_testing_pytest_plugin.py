"""The fixtures that an embedder's test suite gets."""

import subprocess
import sys

import pytest

from snaploader import SnapshotKey
from snaploader.errors import NotFound, Unavailable


def test_the_loader_saves_to_the_fake_cas(snaploader_loader, snaploader_fake_cas, tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    saved = snaploader_loader.cache_snapshot(SnapshotKey(ref="main"), files={"file": tmp_path / "file"})
    assert saved.saved_remotely
    assert b"content" in snaploader_fake_cas.blobs.values()


def test_the_file_cache_is_that_of_the_loader(snaploader_loader, snaploader_file_cache, tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    snaploader_loader.cache_snapshot(SnapshotKey(ref="main"), files={"file": tmp_path / "file"})
    assert snaploader_file_cache.entries()


def test_each_test_begins_with_nothing(snaploader_fake_cas, snaploader_file_cache):
    assert not snaploader_fake_cas.blobs
    assert not snaploader_file_cache.entries()


def test_the_remote_cache_speaks_to_the_server(snaploader_server, snaploader_remote_cache):
    assert snaploader_remote_cache.capabilities().update_enabled
    assert snaploader_server.calls("GetCapabilities") == 1


class TestOfASuiteWithAStoreOfItsOwn:
    @pytest.fixture
    def snaploader_remote_store(self, snaploader_remote_cache):
        return snaploader_remote_cache

    def test_the_loader_takes_it(self, snaploader_loader, snaploader_server):
        with pytest.raises((NotFound, Unavailable)):
            snaploader_loader.get_snapshot_by_id("nobody")
        assert snaploader_server.calls("GetActionResult") == 1


def test_pytest_imports_nothing_of_the_library_before_it_is_used():
    program = (
        "import sys, snaploader.testing.pytest_plugin\n"
        "loaded = {'grpc', 'numpy', 'cow', 'snaploader.loader'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
