"""Restores from a cache folder in which something odd lies where a blob, a ref, a pin or the state should."""

from __future__ import annotations

from pathlib import Path

import pytest
from loader_hosts import Host, HostFactory, image
from odd_entries import ODD_KINDS, make_odd

from snaploader.errors import DataLoss, NotFound
from snaploader.testing import EmbeddedServer

DISK = image(7)
PLACES = {
    "blobs": "v1/groups/_default/blobs/*/??/*",
    "some blobs": "v1/groups/_default/blobs/*/[0-7]?/*",
    "folders of blobs": "v1/groups/_default/blobs/*/??",
    "refs": "v1/groups/_default/refs/??/*",
    "pins": "v1/groups/_default/pins/*",
    "state": "v1/state",
}


def saved(host: Host, folder: Path) -> None:
    """Save a disk, a plain file and a directory, and pin what they consist of."""
    (folder / "home").mkdir(parents=True)
    (folder / "home/name").write_bytes(b"value")
    (folder / "notes").write_bytes(b"plain")
    host.save(DISK, files={"notes": folder / "notes"}, directories={"home": folder / "home"})
    host.cache.pin("kept", set(host.find().digests()))


def restored(host: Host, folder: Path) -> None:
    """Check that everything is there, restored in full and lazily."""
    snapshot = host.find()
    host.loader.restore_snapshot(snapshot, folder / "full")
    assert (folder / "full/disk").read_bytes() == DISK
    assert (folder / "full/notes").read_bytes() == b"plain"
    assert (folder / "full/home/name").read_bytes() == b"value"
    assert host.load() == DISK


def made_odd(host: Host, place: str, kind: str) -> None:
    """Replace what lies in the places by something odd."""
    if kind == "hollow" and place == "folders of blobs":
        pytest.skip("a folder is no file")
    found = list(Path(host.cache.root).glob(PLACES[place]))
    assert found
    for path in found:
        make_odd(path, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ODD_KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_restore_with_a_server_is_complete(
    make_host: HostFactory, server: EmbeddedServer, tmp_path: Path, place: str, kind: str
) -> None:
    first = make_host("host", server)
    saved(first, tmp_path)
    first.loader.close()
    first.cache.close()
    made_odd(first, place, kind)
    again = make_host("host", server)
    restored(again, tmp_path)
    assert again.save(image(8), branch="other").saved_remotely
    again.cache.prune()
    assert again.load() == DISK


@pytest.mark.slow
@pytest.mark.parametrize("kind", ODD_KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_restore_without_a_server_is_complete_or_finds_nothing(
    make_host: HostFactory, tmp_path: Path, place: str, kind: str
) -> None:
    first = make_host("host")
    saved(first, tmp_path)
    first.loader.close()
    first.cache.close()
    made_odd(first, place, kind)
    again = make_host("host")
    if place in ("pins", "state"):
        restored(again, tmp_path)
    else:
        # A file of another size in the place of a blob is damage, everything else counts as nothing.
        with pytest.raises((NotFound, DataLoss)):
            again.find()
        again.save(DISK)
    assert again.load() == DISK
