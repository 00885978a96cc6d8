"""What commands about workspaces work with: catalog, runtime and manager, opened when first asked for.

Nothing of it is imported before, because it needs the extra `workspace` and takes its time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snaploader.cli.output import Output
from snaploader.cli.session import Session
from snaploader.errors import FailedPrecondition, translate_os_errors

if TYPE_CHECKING:
    from snaploader.workspace.catalog import Catalog
    from snaploader.workspace.manager import WorkspaceManager
    from snaploader.workspace.runtime import ProcessRuntime

CATALOG_FILE = "catalog.sqlite"
"""The catalog in the state directory, where no other is named."""

_EXTRAS = {
    "alembic": "workspace",
    "cronsim": "workspace",
    "sqlalchemy": "workspace",
    "prometheus_client": "metrics",
}


@dataclass(frozen=True, slots=True)
class WorkspaceSettings:
    """Where workspaces are, by the names of the options' parameters."""

    catalog: str = field(repr=False)
    """A path or a URL, which may hold a password."""
    state_dir: Path | None
    host_name: str

    @property
    def state_folder(self) -> Path:
        """The folder of this host's workspaces."""
        if self.state_dir is not None:
            return self.state_dir
        base = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
        return Path(base, "snaploader")

    @property
    def catalog_url(self) -> str:
        """The catalog: a URL or a path."""
        return self.catalog or str(self.state_folder / CATALOG_FILE)

    @property
    def has_catalog(self) -> bool:
        """Whether a catalog is named, or there is one in the state directory."""
        return bool(self.catalog) or (self.state_folder / CATALOG_FILE).exists()


class Workspaces:
    """Catalog, runtime and manager of one command; they end with its session. For one thread."""

    def __init__(self, session: Session, settings: WorkspaceSettings) -> None:
        self.session = session
        self.settings = settings

    @property
    def output(self) -> Output:
        """Where the command says things."""
        return self.session.output

    @cached_property
    def catalog(self) -> Catalog:
        """The catalog, made when there is none."""
        with needing_an_extra("workspaces need"):
            from snaploader.workspace.catalog import Catalog

            if not self.settings.catalog:
                self._folder()
            catalog: Catalog = self._ending(Catalog.open(self.settings.catalog_url))
            return catalog

    @cached_property
    def runtime(self) -> ProcessRuntime:
        """What runs the workspaces of this host."""
        with needing_an_extra("workspaces need"):
            from snaploader.workspace.runtime import ProcessRuntime

            runtime: ProcessRuntime = self._ending(ProcessRuntime(self._folder() / "runtime"))
            return runtime

    @cached_property
    def manager(self) -> WorkspaceManager:
        """What does things to workspaces."""
        catalog = self.catalog  # first: it tells best what is missing
        with needing_an_extra("workspaces need"):
            from snaploader.workspace.manager import WorkspaceManager

            manager: WorkspaceManager = self._ending(
                WorkspaceManager(
                    catalog,
                    self.session.loader(),
                    self.session.file_cache,
                    self.runtime,
                    self._folder(),
                    host=self.settings.host_name,
                    instance_name=self.session.settings.remote_instance_name,
                )
            )
            return manager

    def _folder(self) -> Path:
        folder = self.settings.state_folder
        with translate_os_errors(f"cannot use the state directory {str(folder)!r}"):
            folder.mkdir(0o700, parents=True, exist_ok=True)
        return folder

    def _ending(self, opened: Any) -> Any:
        """The same; it is closed with the session, before the caches are."""
        return self.session.enter(contextlib.closing(opened))


@contextlib.contextmanager
def needing_an_extra(what: str) -> Iterator[None]:
    """FailedPrecondition, naming the extra, when the block imports a package that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = _EXTRAS.get(missing)
        if extra is None:
            raise
        raise FailedPrecondition(
            f"{what} the Python package {missing!r}, which is not installed: "
            f"pip install 'snaploader[cli,{extra}]'"
        ) from error
