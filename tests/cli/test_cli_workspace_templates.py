"""`workspace template`, and workspaces that are made from one."""

from __future__ import annotations

from cli_runner import CommandLine


def test_templates_are_made_listed_chosen_from_and_removed(cli: CommandLine) -> None:
    cli.ok("workspace", "policy", "set", "gentle")
    first = cli.json("workspace", "template", "add", "web", "--env", "A=1", "--message", "the first")
    assert (first["template"], first["number"], first["environment"]) == ("web", 1, {"A": "1"})
    text = cli.ok(
        "workspace", "template", "add", "web", "--policy", "gentle", "--ttl", "8h", "--no-activate"
    ).text
    assert text == "version 2 of template web\n"
    [listed] = cli.json("workspace", "template", "ls")["templates"]
    assert listed == {
        "name": "web",
        "active_version": 1,
        "last_version": 2,
        "requires_active_version": False,
    }
    shown = cli.json("workspace", "template", "show", "web")
    assert [(each["policy"], each["ttl_s"]) for each in shown["versions"]] == [
        ("default", None),
        ("gentle", 8 * 3600),
    ]
    assert "the first" in cli.ok("workspace", "template", "show", "web").text
    assert cli.json("workspace", "template", "activate", "web", 2)["active_version"] == 2
    assert cli.json("workspace", "template", "require", "web", "on")["requires_active_version"] is True
    assert "always" in cli.ok("workspace", "template", "ls").text
    assert cli("workspace", "template", "activate", "web", 3).exit_code == 3
    assert cli.json("workspace", "template", "rm", "web") == {"removed": "web"}
    assert cli("workspace", "template", "show", "web").exit_code == 3


def test_a_workspace_is_made_from_a_template_and_updated_at_its_next_start(cli: CommandLine) -> None:
    cli.ok("workspace", "template", "add", "web", "--env", "A=1")
    made = cli.json("workspace", "create", "one", "--template", "web", "--env", "B=2", "--no-start")
    assert (made["base"], made["template_version"], made["automatic_updates"]) == ("web", 1, False)
    assert made["environment"] == {"A": "1", "B": "2"}
    cli.ok("workspace", "template", "add", "web", "--env", "A=3")
    assert "template   web 1 (2 is active)" in cli.ok("workspace", "show", "one").text
    assert "web 1 (2 is active)" in cli.ok("workspace", "ls", "--wide", "--no-sizes").text
    assert cli.json("workspace", "start", "one")["template_version"] == 1
    cli.ok("workspace", "stop", "one")
    assert cli.json("workspace", "set", "one", "--automatic-updates", "always")["automatic_updates"] is True
    updated = cli.json("workspace", "start", "one")
    assert (updated["template_version"], updated["environment"]) == (2, {"A": "3", "B": "2"})
    text = cli.ok("workspace", "show", "one").text
    assert "template   web 2\n" in text
    assert "updates    automatic\n" in text
    assert cli("workspace", "template", "rm", "web").exit_code == 4


def test_a_start_may_update_by_itself(cli: CommandLine) -> None:
    for _ in range(2):
        cli.ok("workspace", "template", "add", "web")
    options = ("--template", "web", "--template-version", 1, "--no-start")
    assert cli.json("workspace", "create", "one", *options)["template_version"] == 1
    assert cli.json("workspace", "start", "one", "--update")["template_version"] == 2
    cli.ok("workspace", "create", "two", "--no-start")
    assert cli("workspace", "start", "two", "--update").exit_code == 4
    assert cli("workspace", "create", "three", "--template-version", 1).exit_code == 2
