"""What the lifecycle goes by: named policies, the status of owners, and what a workspace has of its own."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import click

from snaploader.cli.options import Group, option, shared_options, workspace_command, workspace_options
from snaploader.cli.resources import Workspaces
from snaploader.cli.values import DURATION
from snaploader.cli.workspace.records import workspace_record
from snaploader.errors import InvalidArgument
from snaploader.policy import parse_duration_s
from snaploader.workspace import OwnerStatus, Policy


@click.group(cls=Group)
@workspace_options
@shared_options
def policy(**_shared: object) -> None:
    """Named policies: what pausing and committing hold, when the lifecycle stops, parks and deletes."""


@workspace_command("workspace policy set", group=policy, short_help="Make or change a policy.")
@click.argument("name", metavar="POLICY")
@click.argument("values", metavar="FIELD=VALUE…", nargs=-1)
def set_policy(workspaces: Workspaces, name: str, values: tuple[str, ...]) -> None:
    """Make a policy, or change the fields that are given: onPause=Full onCommit=Data autostopAfterSeconds=8h.

    Durations are seconds, or a number and s, m, h or d; days of the week are written mon-fri, or mon,wed,sat.
    `FIELD=` goes back to the default.
    """
    changes = dict(parse_field(value) for value in values)
    changed = workspaces.manager.change_policy(name, changes)
    workspaces.output.data(_record(changed), *_fields(changed))


@workspace_command("workspace policy show", group=policy, short_help="Show a policy.")
@click.argument("name", metavar="POLICY")
def show_policy(workspaces: Workspaces, name: str) -> None:
    """Show the fields of a policy; rules that are off are left out."""
    with workspaces.catalog.reading() as reader:
        found = reader.policy(name)
    workspaces.output.data(_record(found), *_fields(found))


@workspace_command("workspace policy ls", group=policy, short_help="List the policies.")
def list_policies(workspaces: Workspaces) -> None:
    """List the policies."""
    with workspaces.catalog.reading() as reader:
        found = reader.policies()
    workspaces.output.data({"policies": [_record(each) for each in found]})
    workspaces.output.table({"policy": "name", "fields": lambda each: " ".join(_fields(each))}, found)


@workspace_command("workspace policy rm", group=policy, short_help="Remove a policy that nothing uses.")
@click.argument("name", metavar="POLICY")
def remove_policy(workspaces: Workspaces, name: str) -> None:
    """Remove a policy that no workspace has."""
    with workspaces.catalog.transaction() as transaction:
        transaction.remove_policy(name)
    workspaces.output.data({"removed": name}, f"removed policy {name}")


def parse_field(text: str) -> tuple[str, Any]:
    """A field and its value as `Policy.from_mapping` takes them; None where the value is empty."""
    field, equals, value = text.partition("=")
    if not equals or not field:
        raise InvalidArgument(f"{text[:80]!r} is not FIELD=VALUE, such as onPause=Full")
    if not value:
        return field, None
    if value in {"true", "false"}:
        return field, value == "true"
    if field.endswith("Seconds"):
        try:
            return field, parse_duration_s(value)
        except InvalidArgument as error:
            raise InvalidArgument(f"{field}: {error.message}") from error
    return field, value


def _record(policy: Policy) -> dict[str, Any]:
    """Its name and the fields that are set; whole seconds as integers."""
    fields = {
        field: int(value) if isinstance(value, float) and value.is_integer() else value
        for field, value in policy.to_mapping().items()
    }
    return {"name": policy.name, **fields}


def _fields(policy: Policy) -> list[str]:
    """The fields as `set` takes them."""
    (_, *fields) = _record(policy).items()
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in fields]


@workspace_command("workspace owner")
@click.argument("name", metavar="OWNER")
@click.argument("status", required=False, type=click.Choice([status.value for status in OwnerStatus]))
def owner(workspaces: Workspaces, name: str, status: str | None) -> None:
    """Show whether an owner is active, dormant or suspended, or make it so.

    The lifecycle starts no workspaces of a dormant or suspended owner. It stops those of a suspended one that
    run; those of a dormant one go on until their deadline.
    """
    if status is not None:
        with workspaces.catalog.transaction() as transaction:
            transaction.set_owner_status(name, OwnerStatus(status))
    with workspaces.catalog.reading() as reader:
        found = reader.owner_status(name)
    workspaces.output.data({"owner": name, "status": str(found)}, f"{name}: {found}")


@workspace_command("workspace set")
@click.argument("workspace_id", metavar="WORKSPACE")
@option("--policy", help="Name of its policy.")
@option("--owner", help="Whose it is; empty: nobody's.")
@option("--schedule", metavar="CRON", help="When to start it; empty: never.")
@option("--ttl", type=DURATION, help="How long it runs after its next start; 0: as its policy says.")
@option(
    "--automatic-updates",
    type=click.Choice(["always", "never"]),
    help="Whether its next start takes the active version of its template.",
)
def set_(
    workspaces: Workspaces,
    workspace_id: str,
    policy: str | None,
    owner: str | None,
    schedule: str | None,
    ttl: float | None,
    automatic_updates: str | None,
) -> None:
    """Change what the lifecycle goes by. All else of a workspace is as it was made."""
    if {policy, owner, schedule, ttl, automatic_updates} == {None}:
        raise InvalidArgument("there is nothing to change: give an option that says what")
    workspace = workspaces.manager.change(
        workspace_id,
        policy=policy,
        owner=owner,
        autostart_schedule=schedule,
        ttl=None if ttl is None else timedelta(seconds=ttl),
        automatic_updates=None if automatic_updates is None else automatic_updates == "always",
    )
    workspaces.output.data(workspace_record(workspace), f"changed {workspace_id}")
