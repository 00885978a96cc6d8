"""What `snaploader.workspace` exports, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import snaploader.workspace as workspace


@pytest.mark.parametrize("name", workspace.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(workspace, name) is not None


def test_names_that_are_not_public_are_refused() -> None:
    assert set(dir(workspace)) == set(workspace.__all__)
    with pytest.raises(AttributeError, match="Manager"):
        _ = workspace.Manager


def test_policies_need_no_database() -> None:
    program = (
        "import sys; from snaploader.workspace import Policy, Volume; print('sqlalchemy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_missing_database_library_is_named_with_its_extra() -> None:
    program = "import sys; sys.modules['sqlalchemy'] = None\nfrom snaploader.workspace import Catalog"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Catalog needs sqlalchemy: install snaploader[workspace]" in done.stderr
