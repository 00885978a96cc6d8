"""`workspace` with another state directory than the host's: refused, until the other is said to be lost."""

from __future__ import annotations

from pathlib import Path

from cli_runner import CommandLine


def test_the_state_directory_may_stand_before_the_command(cli: CommandLine, tmp_path: Path) -> None:
    before = ("--state-dir", tmp_path / "here", "--host-name", "h")
    cli.ok(*before, "workspace", "create", "web", "--no-start")
    (listed,) = cli.json(*before, "workspace", "ls")["workspaces"]
    assert (listed["id"], listed["host"]) == ("web", "h")
    assert (tmp_path / "here/catalog.sqlite").exists()
    assert not (tmp_path / "state").exists()


def test_another_state_directory_is_refused_until_recovery_is_told_to_go_on_with_it(
    cli: CommandLine, tmp_path: Path
) -> None:
    cli.ok("workspace", "create", "web", "--no-start")
    cli.ok("workspace", "snapshot", "web")
    elsewhere = (
        "--catalog",
        tmp_path / "state/snaploader/catalog.sqlite",
        "--state-dir",
        tmp_path / "elsewhere",
    )
    refused = cli("workspace", "snapshot", "web", *elsewhere)
    assert refused.exit_code == 4
    assert str(tmp_path / "state/snaploader") in refused.stderr
    assert "--rebind-state" in refused.stderr
    nothing_done = cli("workspace", "recover", *elsewhere)
    assert nothing_done.exit_code == 13
    assert "problem" in nothing_done.text
    assert cli.json("workspace", "ls", *elsewhere)["workspaces"][0]["id"] == "web"
    cli.ok("workspace", "recover", "--rebind-state", *elsewhere)
    cli.ok("workspace", "snapshot", "web", *elsewhere)
    assert cli("workspace", "snapshot", "web").exit_code == 4
