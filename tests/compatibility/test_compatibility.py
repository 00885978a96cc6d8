"""What an earlier release wrote is read and worked on; what this one writes, the earlier one reads.

`make_fixtures.py` says what there is. The earlier release is the commit before the inside of the library was
rebuilt: its data is kept in `data.tar.xz`, its code in the history of the repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import make_fixtures
import pytest

from snaploader.workspace import Catalog

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
EARLIER = "2fc79e2d67eb624f504076831f65b540cb2ec171"


def test_what_an_earlier_release_wrote_is_read_and_worked_on(tmp_path: Path) -> None:
    make_fixtures.unpack(HERE / "data.tar.xz", tmp_path / "data")
    make_fixtures.continue_(tmp_path / "data", tmp_path / "work")


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The code of the earlier release, out of the repository's history."""
    archive = tmp_path / "earlier.tar"
    git = ["git", "-C", str(REPOSITORY), "archive", f"--output={archive}", EARLIER, "snaploader", "cow"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode:
        pytest.skip(f"the repository's history is not here: {done.stderr.strip()}")
    make_fixtures.unpack(archive, tmp_path / "earlier")
    return tmp_path / "earlier"


@pytest.mark.slow
def test_an_earlier_release_reads_and_works_on_what_is_written_now(tmp_path: Path, earlier: Path) -> None:
    make_fixtures.write(tmp_path / "data", tmp_path / "work")
    catalog_path = tmp_path / "data/host/state/catalog.sqlite"
    with Catalog.open(catalog_path) as catalog, catalog.reading() as reader:
        claimed = reader.host_state(make_fixtures.HOST)
        assert claimed is not None
        assert claimed.place
    code = (
        "import runpy, snaploader, sys; print(snaploader.__file__, flush=True)\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(HERE / "make_fixtures.py"), "continue", str(tmp_path / "data")]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(earlier)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == str(earlier / "snaploader/__init__.py")
    with Catalog.open(catalog_path) as catalog, catalog.reading() as reader:
        assert reader.host_state(make_fixtures.HOST) == claimed
