"""Templates: their versions, which one is active, and how a start takes a workspace to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

from snaploader.errors import FailedPrecondition, NotFound
from snaploader.workspace.catalog import Transaction
from snaploader.workspace.manager.operation import Services, Work
from snaploader.workspace.model import Readiness, Resources, Volume, Workspace, WorkspaceSpec, check_spec
from snaploader.workspace.policy import DEFAULT_POLICY, check_scopes
from snaploader.workspace.templates import (
    Template,
    TemplateVersion,
    check_version,
    is_to_be_updated,
    updated,
)

UPDATE = "workspace_update"


class Templates:
    """The templates of a catalog. Made by `WorkspaceManager`; thread-safe.

    What names a template or a version that is not there raises NotFound.
    """

    def __init__(self, services: Services) -> None:
        self._services = services

    def add_version(
        self,
        name: str,
        *,
        command: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
        volumes: Iterable[Volume] = (),
        readiness: Readiness | None = None,
        image: str = "",
        devices: Iterable[str] = (),
        resources: Resources | None = None,
        labels: Mapping[str, str] | None = None,
        policy: str = DEFAULT_POLICY,
        ttl: timedelta | None = None,
        message: str = "",
        activate: bool = True,
    ) -> TemplateVersion:
        """Add the next version of a template, and the template if there is none of that name.

        What is not described here is as for `WorkspaceManager.create`.

        Args:
            name: Of the template, up to 200 printable characters.
            message: What is new in it, up to 200 printable characters.
            activate: Whether it becomes the active version, as the first one always does.

        Raises:
            InvalidArgument: something is malformed, or the runtime cannot capture what the policy asks for.
            NotFound: there is no such policy.
        """
        for what, texts in (("command", command), ("devices", devices)):
            if isinstance(texts, str):
                raise TypeError(f"the {what} must be a sequence, and not one str: {texts!r}")
        spec = WorkspaceSpec(
            "",
            tuple(command),
            environment or {},
            tuple(volumes),
            readiness or Readiness(),
            image,
            tuple(devices),
            resources or Resources(),
            labels or {},
        )
        given = TemplateVersion(name, 0, spec, self._services.clock(), policy, ttl, message)
        with self._services.catalog.transaction() as tx:
            check_scopes(tx.policy(policy), self._services.runtime.scopes)
            version = tx.add_template_version(check_version(given))
            if activate:
                tx.change_template(version.template, active_version=version.number)
            return version

    def activate(self, name: str, number: int) -> Template:
        """Choose the version that new workspaces are made from, and that automatic updates lead to."""
        with self._services.catalog.transaction() as tx:
            version = tx.template_version(name, number)
            check_scopes(tx.policy(version.policy), self._services.runtime.scopes)
            return tx.change_template(name, active_version=number)

    def require_active_version(self, name: str, required: bool = True) -> Template:
        """Say whether all workspaces of a template are updated automatically, also those that do not ask."""
        with self._services.catalog.transaction() as tx:
            return tx.change_template(name, requires_active_version=required)

    def remove(self, name: str) -> None:
        """Forget a template with all its versions.

        Raises:
            FailedPrecondition: a workspace that is not deleted was made from it.
        """
        with self._services.catalog.transaction() as tx:
            tx.remove_template(name)

    def get(self, name: str) -> Template:
        """The template of that name."""
        with self._services.catalog.reading() as reader:
            return reader.template(name)

    def all(self) -> list[Template]:
        """All templates, by name."""
        with self._services.catalog.reading() as reader:
            return reader.templates()

    def versions(self, name: str) -> list[TemplateVersion]:
        """All versions of a template, by number."""
        with self._services.catalog.reading() as reader:
            reader.template(name)
            return reader.template_versions(name)


class PendingUpdate(NamedTuple):
    """The update that a start makes."""

    old: TemplateVersion
    new: TemplateVersion


def check_made_from_template(workspace: Workspace) -> None:
    """FailedPrecondition when there is nothing that a workspace could be updated to."""
    if workspace.template_version is None:
        raise FailedPrecondition(
            f"workspace {workspace.id!r} was not made from a template: there is nothing to update it to"
        )


def begin_update(work: Work, *, asked: bool) -> PendingUpdate | None:
    """Let what is about to be started be as the active version of its template says, if it is to be updated.

    Args:
        asked: Whether somebody wants the update, automatic or not.
    """
    workspace, services = work.workspace, work.services
    if workspace.template_version is None:
        return None
    with services.catalog.reading() as reader:
        try:
            template = reader.template(workspace.base)
            old = reader.template_version(workspace.base, workspace.template_version)
        except NotFound:
            if asked:
                raise
            return None  # a catalog that was lost knows the workspace from its record alone
        if old.number == template.active_version or not (asked or is_to_be_updated(workspace, template)):
            return None
        new = reader.template_version(template.name, template.active_version)
        after = updated(workspace, old, new)
        check_scopes(reader.policy(after.policy), services.runtime.scopes)
    work.workspace = replace(workspace, spec=check_spec(after.spec))
    return PendingUpdate(old, new)


def record_update(work: Work, tx: Transaction, update: PendingUpdate | None) -> None:
    """Record an update, before the run of the start, whose deadline it may set."""
    if update is None:
        return
    old, new = update
    before: Workspace = tx.lock_workspace(work.workspace_id)
    after = updated(before, old, new)  # once more: its policy may have been changed meanwhile
    tx.update_workspace(
        work.workspace_id,
        now=work.now,
        spec=after.spec,
        policy=after.policy,
        ttl=after.ttl,
        template_version=after.template_version,
    )
    work.record_event(tx, UPDATE, from_version=old.number, to_version=new.number)
