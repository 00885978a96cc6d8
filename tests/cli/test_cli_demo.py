"""The demo holds, and says so when something does not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from cli_runner import CommandLine

from cow import COWStore
from snaploader.cli import demo_image
from snaploader.cli.demo_image import Window
from snaploader.errors import FailedPrecondition, Internal
from snaploader.loader.loader import SnapshotLoader

needs_e2fsprogs = pytest.mark.skipif(
    shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin") is None, reason="needs e2fsprogs"
)
SMALL = ["--size", "64MiB", "--data", "16MiB"]


@needs_e2fsprogs
@pytest.mark.slow
def test_every_proof_holds(cli: CommandLine, tmp_path: Path) -> None:
    outcome = cli("demo", *SMALL, "--work-dir", tmp_path / "work", "--json")
    assert outcome.exit_code == 0, outcome
    assert outcome.json["passed"] is True
    assert len(outcome.json["proofs"]) == 16
    assert all(proof["holds"] for proof in outcome.json["proofs"])
    steps = {step["step"]: step for step in outcome.json["steps"]}
    assert steps["save feature"]["uploaded_bytes"] < steps["save main"]["uploaded_bytes"] / 10
    assert steps["restore main"]["fetched_bytes"] > 8 << 20
    assert os.listdir(tmp_path / "work") == []


@needs_e2fsprogs
@pytest.mark.slow
def test_a_wrong_byte_is_caught(cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of a restored image is changed, in the middle of the file that is looked at."""
    real = SnapshotLoader.restore_snapshot

    def damage(self: SnapshotLoader, snapshot: object, folder: Path, **options: object) -> object:
        result = real(self, snapshot, folder, **options)  # type: ignore[arg-type]
        with next(iter(result.files.values())).open("r+b") as file:
            content = file.read()
            place = content.index(b"import ")
            file.seek(place)
            file.write(b"I")
        return result

    monkeypatch.setattr(SnapshotLoader, "restore_snapshot", damage)
    outcome = cli("demo", *SMALL, "--work-dir", tmp_path)
    assert outcome.exit_code == 13
    assert "the image of main is right to the last byte" in outcome.stderr
    assert "FAILED" in outcome.text


def test_missing_tools_are_named_with_their_package(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_image, "_find", lambda _tool: None)
    outcome = cli("demo", "--work-dir", tmp_path)
    assert outcome.exit_code == 4
    assert "apt-get install e2fsprogs" in outcome.stderr


@pytest.fixture
def small_image(tmp_path: Path) -> Path:
    """An image with a file in a folder that is deep, and one that has a hole."""
    tree = tmp_path / "tree"
    (tree / "a/b/c").mkdir(parents=True)
    (tree / "a/b/c/file").write_bytes(bytes(range(256)) * 100)
    for number in range(500):
        (tree / f"a/entry-{number:03}-with-a-name-that-fills-the-folder").touch()
    with (tree / "a/holes").open("wb") as file:
        file.write(b"begin")
        file.seek(100_000)
        file.write(b"end")
    path = tmp_path / "image"
    demo_image.make_image(path, tree, 16 << 20)
    return path


@needs_e2fsprogs
@pytest.mark.parametrize("name", ["a/b/c/file", "a/holes"])
def test_debugfs_reads_through_a_window_what_it_reads_from_the_image(
    small_image: Path, tmp_path: Path, name: str
) -> None:
    with COWStore.from_file(small_image, tmp_path / "store", copy=False) as store:
        window = Window(store, tmp_path / "window")
        assert window.read_file(f"/{name}") == (tmp_path / "tree" / name).read_bytes()
        assert 0 < window.loaded_bytes < 200_000
        assert store.read_at(window.offset(f"/{name}"), 5) == (tmp_path / "tree" / name).read_bytes()[:5]


@needs_e2fsprogs
def test_a_window_onto_a_damaged_image_is_an_error(small_image: Path, tmp_path: Path) -> None:
    with small_image.open("r+b") as file:
        file.seek(1024)
        file.write(bytes(1024))
    with (
        COWStore.from_file(small_image, tmp_path / "store", copy=False) as store,
        pytest.raises(Internal, match="debugfs"),
    ):
        Window(store, tmp_path / "window")


@needs_e2fsprogs
def test_e2fsck_sees_damage(small_image: Path) -> None:
    assert demo_image.is_clean(small_image)[0]
    block = demo_image.inode_block(small_image, "/a") * 4096
    with small_image.open("r+b") as file:
        file.seek(block)
        file.write(b"\xff" * 4096)
    assert not demo_image.is_clean(small_image)[0]


@needs_e2fsprogs
def test_an_image_that_is_too_small_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"x" * (4 << 20))
    with pytest.raises(FailedPrecondition, match="mke2fs failed"):
        demo_image.make_image(tmp_path / "image", tmp_path / "tree", 1 << 20)


def test_a_budget_without_room_for_a_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="--data"):
        demo_image.build_image(tmp_path / "image", 64 << 20, 1, tmp_path)
