"""What is shipped, what importing it needs and does, and that generated and declared things agree."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import tomllib
import types
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent.parent
PACKAGES = [
    "cow",
    "snaploader",
    "snaploader.filecache",
    "snaploader.loader",
    "snaploader.remote",
    "snaploader.testing",
]


def run(*arguments: str) -> str:
    """Run Python with warnings as errors; what it prints."""
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_nothing_else(wheel_names: list[str]) -> None:
    code = {name for name in wheel_names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in code} == {"cow", "snaploader"}
    assert {Path(name).suffix for name in code} == {".py", ".pyi", ".typed"}
    assert {"cow/py.typed", "snaploader/py.typed", "snaploader/_proto/remote_execution_pb2.pyi"} <= code


@pytest.mark.slow
def test_the_wheel_tells_fsspec_of_its_file_system(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        text = archive.read(name).decode()
    assert "[fsspec.specs]\nsnap = snaploader.fsspec:SnapshotFileSystem\n" in text


@pytest.mark.slow
def test_the_wheel_holds_every_module_of_the_checkout(wheel_names: list[str]) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "cow", "snaploader"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert set(listed.stdout.split()) <= set(wheel_names)


def test_the_library_imports_without_the_extras_and_starts_nothing() -> None:
    blocked = ["click", "fsspec", "rich", "cryptography", "psutil", "pytest", "hypothesis", "grpc_tools"]
    script = f"""
import sys
sys.modules.update(dict.fromkeys({blocked}))
import numpy, os, threading
descriptors, threads = os.listdir("/proc/self/fd"), threading.enumerate()
import cow, snaploader, snaploader.testing
import logging
assert os.listdir("/proc/self/fd") == descriptors
assert threading.enumerate() == threads
assert not logging.getLogger().handlers and not logging.getLogger("snaploader").handlers
assert "snaploader.cli" not in sys.modules
"""
    assert run("-c", script) == ""


def test_importing_the_library_imports_no_part_of_it_that_is_not_asked_for() -> None:
    script = """
import sys
import snaploader
assert not {"numpy", "grpc", "google.protobuf", "snaploader.loader"} & set(sys.modules)
from snaploader import NotFound
assert "grpc" not in sys.modules
assert snaploader.errors.NotFound is snaploader.NotFound is NotFound
assert set(snaploader.__all__) == set(dir(snaploader))
assert not hasattr(snaploader, "Nothing")
from snaploader import *
assert SnapshotLoader is snaploader.loader.SnapshotLoader
"""
    assert run("-c", script) == ""


def test_cow_needs_nothing_but_numpy() -> None:
    blocked = ["snaploader", "blake3", "google", "grpc", "tenacity", "zstandard"]
    run("-c", f"import sys; sys.modules.update(dict.fromkeys({blocked})); import cow; cow.COWStore")


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_imports_for_its_users_is_what_it_says_it_exports(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        getattr(module, name)  # some packages import it only now
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }
    dunder = {name for name in module.__all__ if name.startswith("__")}
    when_asked_for = {name for name in module.__all__ if name not in vars(module) and hasattr(module, name)}
    assert public | dunder | when_asked_for == set(module.__all__)
    assert len(module.__all__) == len(set(module.__all__))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_class_and_function_says_what_it_is(package: str) -> None:
    module = importlib.import_module(package)
    things = {name: getattr(module, name) for name in module.__all__}
    silent = [
        name
        for name, thing in things.items()
        if (inspect.isclass(thing) or inspect.isfunction(thing))
        # A dataclass without a docstring gets its signature for one.
        and (not thing.__doc__ or thing.__doc__.startswith(f"{name}("))
        and not hasattr(thing, "DESCRIPTOR")
    ]
    assert silent == []


def test_generated_messages_are_current() -> None:
    pytest.importorskip("grpc_tools")
    subprocess.run([sys.executable, "protos/generate.py", "--check"], cwd=CHECKOUT, check=True)


def test_the_oldest_dependencies_tested_are_those_declared() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = list(project["dependencies"])
    for extra in ("aio", "cli", "fsspec", "metrics", "otel", "postgresql", "serve", "workspace"):
        # A constraint names no extras of what it constrains.
        declared += [floor.replace("[binary]", "") for floor in extras[extra]]
    tested = (CHECKOUT / ".ci" / "oldest.txt").read_text().splitlines()
    assert [line for line in tested if line and not line.startswith("#")] == sorted(
        re.sub(r">=", "==", floor) for floor in declared
    )
    assert all(re.fullmatch(r"[a-z0-9-]+>=[0-9.]+", floor) for floor in declared)


def test_the_core_install_has_six_dependencies() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert [re.split(">", floor)[0] for floor in project["dependencies"]] == [
        "blake3",
        "grpcio",
        "numpy",
        "protobuf",
        "tenacity",
        "zstandard",
    ]


def test_release_notes_can_be_made_from_their_fragments() -> None:
    pytest.importorskip("towncrier")
    draft = ["build", "--draft", "--version", "0.0.0", "--date", "2000-01-01"]
    done = subprocess.run(
        [sys.executable, "-m", "towncrier", *draft], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert "## 0.0.0 (2000-01-01)" in done.stdout
