"""`snaploader workspace template`: what workspaces are made from, in versions of which one is active."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from snaploader.cli.options import Group, option, shared_options, workspace_command, workspace_options
from snaploader.cli.output import record
from snaploader.cli.resources import Workspaces
from snaploader.cli.values import DURATION
from snaploader.cli.workspace.operations import WithCommand, made_with, spec_options
from snaploader.cli.workspace.records import spec_record, ttl_record

if TYPE_CHECKING:
    from snaploader.workspace import Template, TemplateVersion  # which need the extra

_TEMPLATE = ("name", "active_version", "last_version", "requires_active_version")


@click.group(cls=Group)
@workspace_options
@shared_options
def template(**_shared: object) -> None:
    """Templates: what workspaces are made from, in numbered versions of which one is active."""


@workspace_command(
    "workspace template add", group=template, cls=WithCommand, short_help="Add a version of a template."
)
@click.argument("name", metavar="TEMPLATE")
@spec_options
@option("--policy", default="default", help="The policy of its workspaces.")
@option("--ttl", type=DURATION, help="How long they run after a start.  [default: as their policy says]")
@option("--message", default="", help="What is new in it.")
@option("--no-activate", is_flag=True, help="Leave the active version as it is.")
def add(workspaces: Workspaces, /, name: str, message: str, no_activate: bool, **options: Any) -> None:
    """Add the next version of a template, which becomes the active one; the first one makes the template.

    It says all that its workspaces are made with: nothing is taken from the version before.
    """
    version = workspaces.manager.templates.add_version(
        name, message=message, activate=not no_activate, **made_with(**options)
    )
    workspaces.output.data(_version(version), f"version {version.number} of template {version.template}")


@workspace_command("workspace template activate", group=template, short_help="Choose the active version.")
@click.argument("name", metavar="TEMPLATE")
@click.argument("number", metavar="VERSION", type=int)
def activate(workspaces: Workspaces, name: str, number: int) -> None:
    """Choose the version that new workspaces are made from, and that automatic updates lead to."""
    changed = workspaces.manager.templates.activate(name, number)
    workspaces.output.data(record(changed, *_TEMPLATE), f"version {number} of template {name} is active")


@workspace_command(
    "workspace template require", group=template, short_help="Update all its workspaces, or not."
)
@click.argument("name", metavar="TEMPLATE")
@click.argument("required", metavar="on|off", type=click.Choice(["on", "off"]))
def require(workspaces: Workspaces, name: str, required: str) -> None:
    """Say whether every start of its workspaces takes the active version, whatever they say themselves."""
    changed = workspaces.manager.templates.require_active_version(name, required == "on")
    told = (
        "all its workspaces are updated"
        if required == "on"
        else "its workspaces say whether they are updated"
    )
    workspaces.output.data(record(changed, *_TEMPLATE), f"template {name}: {told}")


@workspace_command("workspace template ls", group=template, short_help="List the templates.")
def list_templates(workspaces: Workspaces) -> None:
    """List the templates."""
    found = workspaces.manager.templates.all()
    workspaces.output.data({"templates": [record(each, *_TEMPLATE) for each in found]})
    workspaces.output.table(
        {
            "template": "name",
            "active>": "active_version",
            "versions>": "last_version",
            "updates": lambda each: "always" if each.requires_active_version else "as asked for",
        },
        found,
    )


@workspace_command("workspace template show", group=template, short_help="List the versions of a template.")
@click.argument("name", metavar="TEMPLATE")
def show(workspaces: Workspaces, name: str) -> None:
    """List the versions of a template; with --json, all that each says."""
    found = workspaces.manager.templates.get(name)
    versions = workspaces.manager.templates.versions(name)
    workspaces.output.data(
        {**record(found, *_TEMPLATE), "versions": [_version(version) for version in versions]}
    )
    workspaces.output.table(
        {
            "version>": "number",
            "created": "created_at",
            "policy": "policy",
            "message": "message",
            "": lambda version: _mark(found, version),
        },
        versions,
    )


@workspace_command("workspace template rm", group=template, short_help="Remove a template that nothing uses.")
@click.argument("name", metavar="TEMPLATE")
def remove(workspaces: Workspaces, name: str) -> None:
    """Remove a template from which no workspace was made, with all its versions."""
    workspaces.manager.templates.remove(name)
    workspaces.output.data({"removed": name}, f"removed template {name}")


def _mark(template: Template, version: TemplateVersion) -> str:
    return "active" if version.number == template.active_version else ""


def _version(version: TemplateVersion) -> dict[str, Any]:
    return {
        **record(version, "template", "number", "created_at", "policy", "message"),
        **ttl_record(version.ttl),
        **spec_record(version.spec),
    }
