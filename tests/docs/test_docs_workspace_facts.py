"""The page on workspaces has the defaults, methods and numbers that the code has."""

from __future__ import annotations

import re
from pathlib import Path

from snaploader.workspace import host, model
from snaploader.workspace.lifecycle import MAX_CONCURRENCY
from snaploader.workspace.manager import WorkspaceManager, held_workspace, manager
from snaploader.workspace.model import MAX_VERSION
from snaploader.workspace.policy import RETRY_DELETE_AFTER, Policy
from snaploader.workspace.runtime import Runtime
from snaploader.workspace.runtime.protocol import DEFAULT_STOP_TIMEOUT_S

PAGE = (Path(__file__).resolve().parents[2] / "docs/workspaces.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())
ABOUT_THE_MANAGER = {"close", "hold", "try_hold", "recover", "workspace"}
PARTS = {"catalog", "loader", "file_cache", "runtime", "host", "instance_name", "locks", "records", "slots"}


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_every_field_of_a_policy_has_its_default() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section("Policies"), re.MULTILINE))
    defaults = dict.fromkeys(told, "off") | {"onCommit": "what `onPause` is"}
    for name, value in Policy().to_mapping().items():
        defaults[name] = f"`{str(value).lower() if isinstance(value, bool) else value}`"
    assert told == defaults


def test_everything_that_a_manager_does_is_told() -> None:
    public = {name for name in dir(WorkspaceManager) if not name.startswith("_")}
    for name in public - ABOUT_THE_MANAGER - PARTS:
        assert re.search(rf"`{name}[`(]", section("Operations")), name


def test_every_method_of_a_runtime_is_told() -> None:
    methods = {name for name in vars(Runtime) if not name.startswith("_")}
    told = re.findall(r"^- \*\*(.+?)\*\*", section("Writing a runtime"), re.MULTILINE)
    assert {name for cell in told for name in re.findall(r"`(\w+)`", cell)} == methods - {"close"}


def test_numbers_are_those_of_the_code() -> None:
    assert f"An id is 1 to {model.MAX_ID_LENGTH} lower-case letters" in WORDS
    assert f"up to {model.MAX_DISPLAY_NAME_LENGTH} printable characters" in WORDS
    assert f"go up to {MAX_VERSION}" in WORDS
    assert f"A host has {host.DEFAULT_SLOTS:,} slots" in WORDS
    assert f"works on {held_workspace.DEFAULT_WORKERS} at once" in WORDS
    assert f"at most {MAX_CONCURRENCY} at once" in WORDS
    assert f"Up to {model.MAX_VOLUMES};" in WORDS
    assert f"waited for up to {manager.DEFAULT_LOCK_TIMEOUT_S / 60:.0f} minutes" in WORDS
    assert f"after {DEFAULT_STOP_TIMEOUT_S:.0f} s by force" in WORDS
    assert f"{RETRY_DELETE_AFTER.total_seconds() / 3600:.0f} hours after a" in WORDS
