"""Templates: what workspaces are made from, in numbered versions of which one is active. Pure.

A version never changes. A workspace records which one it was made from. It is made as the version says, but
for what its maker gives besides; so what differs from the version is the workspace's own, and stays when the
workspace is updated to another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Any

from snaploader.errors import InvalidArgument
from snaploader.workspace.model import (
    NO_CHECK,
    Resources,
    Workspace,
    WorkspaceSpec,
    check_printable,
    check_spec,
    check_ttl,
)
from snaploader.workspace.policy import DEFAULT_POLICY

_OF_SPEC = ("command", "environment", "readiness", "image", "devices", "resources", "labels")
"""What an update changes of a spec. Volumes stay: they are where the workspace's data lies."""


@dataclass(frozen=True, slots=True)
class Template:
    """A template as the catalog knows it."""

    name: str
    active_version: int
    """The version that new workspaces are made from, and that automatic updates lead to."""
    last_version: int
    requires_active_version: bool = False
    """Whether all its workspaces are updated automatically, whatever they say themselves."""


@dataclass(frozen=True, slots=True)
class TemplateVersion:
    """What workspaces that are made from a template are. Never changes."""

    template: str
    number: int
    """From 1 on, without gaps."""
    spec: WorkspaceSpec
    """Of no workspace: its id is empty."""
    created_at: datetime
    policy: str = DEFAULT_POLICY
    ttl: timedelta | None = None
    message: str = ""
    """What is new in it, for people."""


@dataclass(frozen=True, slots=True)
class TemplateUpdate:
    """That a workspace was taken from one version of its template to another."""

    template: str
    from_version: int
    to_version: int


def check_version(version: TemplateVersion) -> TemplateVersion:
    """The version in normal form. InvalidArgument or TypeError when no workspace could be made from it."""
    name = check_printable(version.template, "name for a template")
    if not name:
        raise InvalidArgument("a template needs a name")
    spec = check_spec(replace(version.spec, workspace_id="any"))
    return replace(
        version,
        template=name,
        spec=replace(spec, workspace_id=""),
        ttl=check_ttl(version.ttl),
        message=check_printable(version.message, "message of a version"),
    )


def made_from(version: TemplateVersion, own: WorkspaceSpec) -> WorkspaceSpec:
    """The spec of a workspace that is made from a version, and has for its own what is not empty in `own`.

    Single variables, labels and resources are added to those of the version, or take their place.
    """
    template = version.spec
    has_check = own.readiness.kind != NO_CHECK
    return WorkspaceSpec(
        own.workspace_id,
        own.command or template.command,
        {**template.environment, **own.environment},
        own.volumes or template.volumes,
        own.readiness if has_check else template.readiness,
        own.image or template.image,
        own.devices or template.devices,
        Resources(
            own.resources.vcpus or template.resources.vcpus,
            own.resources.memory_bytes or template.resources.memory_bytes,
        ),
        {**template.labels, **own.labels},
    )


def is_to_be_updated(workspace: Workspace, template: Template) -> bool:
    """Whether the next start that makes its process afresh takes the active version."""
    wants = workspace.automatic_updates or template.requires_active_version
    return wants and workspace.template_version not in {None, template.active_version}


def updated(workspace: Workspace, old: TemplateVersion, new: TemplateVersion) -> Workspace:
    """The workspace after it was taken from the version it has to another one.

    What it has as the old one says becomes what the new one says; what it has of its own stays, of the
    environment, the labels and the resources each on its own. So do its volumes.
    """
    changed = {
        name: _merged(*(getattr(spec, name) for spec in (workspace.spec, old.spec, new.spec)))
        for name in _OF_SPEC
    }
    return replace(
        workspace,
        spec=replace(workspace.spec, **changed),
        policy=_merged(workspace.policy, old.policy, new.policy),
        ttl=_merged(workspace.ttl, old.ttl, new.ttl),
        template_version=new.number,
    )


def _merged(own: Any, old: Any, new: Any) -> Any:
    if isinstance(own, Mapping):
        return {
            **new,
            **{name: value for name, value in own.items() if name not in old or old[name] != value},
        }
    if isinstance(own, Resources):
        names = [each.name for each in fields(Resources)]
        return Resources(*(_merged(*(getattr(each, name) for each in (own, old, new))) for name in names))
    return new if own == old else own
