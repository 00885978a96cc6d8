"""The documentation agrees with the code: links, Python, and what the worked examples show."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snaploader import Digest, DigestFunction, RemoteCache
from snaploader._proto import remote_execution_pb2
from snaploader.digest import hash_strings
from snaploader.testing import EmbeddedServer

CHECKOUT = Path(__file__).resolve().parent.parent.parent
PAGES = [
    CHECKOUT / "README.md",
    CHECKOUT / "CONTRIBUTING.md",
    *sorted((CHECKOUT / "docs").rglob("*.md")),
]
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOKEN = re.compile(r"[0-9]+-[0-9a-f]{16}(\.[0-9]+$)?", re.MULTILINE)
"""Of an open cache, and a number after it."""
MAX_COLUMNS = 120


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    """A page without its code blocks and spans, in which brackets and hashes mean other things."""
    return re.sub(r"`[^`\n]+`", "code", FENCE.sub("", text))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page, in order."""
    return [code for found, code in FENCE.findall(text_of(page)) if found == language]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def name_of(page: Path) -> str:
    return str(page.relative_to(CHECKOUT))


def dumped(block: str) -> bytes:
    """The bytes of a block in the form of xxd."""
    return bytes.fromhex("".join(line[10:49] for line in block.splitlines()))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(without_code(text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_python_block_compiles_and_imports_what_exists(page: Path) -> None:
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                module = importlib.import_module(node.module)
                absent = [
                    alias.name
                    for alias in node.names
                    if not hasattr(module, alias.name)
                    and importlib.util.find_spec(f"{node.module}.{alias.name}") is None
                ]
                assert not absent, f"{node.module} has no {absent}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_line_of_a_page_is_over_120_columns(page: Path) -> None:
    assert not [line for line in text_of(page).splitlines() if len(line) > MAX_COLUMNS]


@pytest.fixture
def usual_umask() -> Iterator[None]:
    """The pages show modes as they are with the usual umask."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def run_example(page: Path) -> dict[str, Any]:
    """Run the one Python block of a page in the working directory; its names."""
    (code,) = blocks(page, "python")
    names: dict[str, Any] = {}
    exec(compile(code, name_of(page), "exec"), names)
    return names


@pytest.mark.usefixtures("usual_umask")
def test_the_example_of_the_file_cache_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = CHECKOUT / "docs/formats/filecache.md"
    names = run_example(page)
    try:
        assert len(names["missing"]) == 1023
        # Three blocks of grammar come first: names, the ref file and the pin file.
        listing, ref, pin, lease, ledger, uses, state = blocks(page, "")[3:]
        base = tmp_path / "cache/v1"
        assert tree_of(base) == [TOKEN.sub("TOKEN", line) for line in listing.splitlines()]
        files = [path for path in (base / "groups").rglob("*") if path.is_file()]
        entries = [path for path in files if path.parent.name != "pins"]
        (ref_path,) = [path for path in entries if "refs" in path.parts]
        assert ref_path.read_bytes() == dumped(ref)
        assert (base / "groups/team-a/pins/version-1").read_bytes() == dumped(pin)
        (lease_path,) = (base / "leases").iterdir()
        assert lease_path.read_bytes() == dumped(lease)
        # The page was written on a file system with blocks of 4096 bytes.
        total = sum(path.stat().st_blocks * 512 for path in entries).to_bytes(8, "little")
        shown = dumped(ledger)
        assert (base / "usage/ledger").read_bytes() == shown[:8] + total + shown[16:]
        # A key, and the time of this run.
        assert (base / "usage/uses").read_bytes()[:8] == dumped(uses)[:8]
        assert len(dumped(uses)) == 16
        assert masked_state((base / "state").read_text()) == masked_state(state.rstrip("\n"))
    finally:
        names["cache"].close()


def tree_of(base: Path) -> list[str]:
    """Files and empty folders: mode, size, path, with `TOKEN` for what differs from run to run."""
    lines = []
    for path in sorted(base.rglob("*")):
        status = path.stat()
        if path.is_file() or not os.listdir(path):
            size = "-" if path.is_dir() else str(status.st_size)
            mode = stat.S_IMODE(status.st_mode)
            name = TOKEN.sub("TOKEN", str(path.relative_to(base)))
            lines.append(f"{mode:04o} {size:>3}  {name}")
    return lines


def masked_state(text: str) -> str:
    """A state file without its checksum, boot and time."""
    return re.sub(r"[0-9a-f]{64}|[0-9a-f]{8}-[0-9a-f-]{27}|[0-9]{19}", "X", text)


def test_the_example_of_the_private_files_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = CHECKOUT / "docs/formats/cow.md"
    names = run_example(page)
    with names["store"]:
        listing = blocks(page, "")[1]
        assert files_of(tmp_path / "scratch") == listing.splitlines()
        names["checkpoint"].commit()
        assert not (tmp_path / "scratch/1.0").exists()
    assert not (tmp_path / "scratch").exists()


def files_of(folder: Path) -> list[str]:
    """Mode, size, name."""
    found = [(path, path.stat()) for path in sorted(folder.iterdir())]
    return [f"{stat.S_IMODE(s.st_mode):04o} {s.st_size:>6}  {path.name}" for path, s in found]


def test_the_example_of_the_servers_result_is_true(tmp_path: Path) -> None:
    (_, shown) = blocks(CHECKOUT / "docs/formats/server.md", "")
    action = Digest(hash_strings("example"), 1, DigestFunction.SHA256)
    with EmbeddedServer(tmp_path) as server, RemoteCache(server.url, instance_name="a/b") as remote:
        remote.update_action_result(action, remote_execution_pb2.ActionResult(stdout_raw=b"x"))
    stored = tmp_path / f"v1/instances/=a%2Fb/results/96/sha256-{action.hash}-1"
    assert stored.read_bytes() == dumped(shown)
