"""What a command works with: caches, a loader, a catalog, made from the options when first asked for.

Nothing of it is imported before, because it takes its time, and workspaces need the extra `workspace`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snaploader.cli.output import Output
from snaploader.cli.process import load_grpc
from snaploader.cli.values import check_file, format_time
from snaploader.errors import InvalidArgument, SnaploaderError, translate_os_errors
from snaploader.files import open_private

if TYPE_CHECKING:
    from snaploader.digest import Digest, DigestFunction
    from snaploader.filecache import FileCache
    from snaploader.loader import SnapshotLoader
    from snaploader.remote import RemoteCache, RetryEvent, TLSConfig
    from snaploader.telemetry import Observer
    from snaploader.workspace import Catalog, ProcessRuntime, WorkspaceManager

MAX_SECRET_BYTES = 64 << 10

REMOTE_FILES = ("bearer_token_file", "netrc", "tls_certificate", "tls_client_certificate", "tls_client_key")
"""Settings that name files which the remote cache needs. --credential-helper is a program instead."""

CATALOG_FILE = "catalog.sqlite"
"""The catalog in the state directory, where no other is named."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The shared options, by the names of their parameters."""

    cache_dir: Path | None
    max_cache_size: int
    cache_mode: int
    group_id: str
    remote_cache: str
    remote_instance_name: str
    remote_header: tuple[tuple[str, str], ...] = field(repr=False)
    remote_timeout: float
    remote_retries: int
    remote_cache_compression: bool
    remote_readonly: bool
    bearer_token_file: Path | None
    credential_helper: str | None
    netrc: Path | None
    tls_certificate: Path | None
    tls_client_certificate: Path | None
    tls_client_key: Path | None
    tls_server_name: str
    digest_function: str

    @property
    def cache_folder(self) -> Path:
        if self.cache_dir is not None:
            return self.cache_dir
        import platformdirs

        return platformdirs.user_cache_path("snaploader", appauthor=False)

    @property
    def function(self) -> DigestFunction | None:
        """The digest function asked for; None leaves it to the server."""
        if self.digest_function == "auto":
            return None
        from snaploader.digest import DigestFunction

        return DigestFunction.parse(self.digest_function)

    def open_file_cache(self, observer: Observer | None = None) -> FileCache:
        from snaploader.filecache import FileCache

        return FileCache(
            self.cache_folder,
            max_bytes=self.max_cache_size,
            cache_mode=self.cache_mode,
            group_id=self.group_id,
            observer=observer,
        )

    def check_files(self, names: Collection[str]) -> None:
        """InvalidArgument when a file is missing that one of these settings names for the remote cache."""
        for name in REMOTE_FILES:
            path: Path | None = getattr(self, name)
            if path is not None and name in names:
                check_file("--" + name.replace("_", "-"), path)
        helper = self.credential_helper if "credential_helper" in names else None
        if helper is not None and shutil.which(helper) is None:
            raise InvalidArgument(f"--credential-helper: {helper!r} is no program that can be run")


class Caches(contextlib.ExitStack):
    """Caches and loaders of one command, closed in reverse order at its end. For one thread."""

    def __init__(self, settings: Settings, output: Output) -> None:
        super().__init__()
        self.settings = settings
        self.output = output
        self.observer: Observer | None = None
        """Whom caches and loaders report to. To be set before they are first asked for."""

    @cached_property
    def file_cache(self) -> FileCache:
        return self.enter_context(self.settings.open_file_cache(self.observer))

    @cached_property
    def remote_cache(self) -> RemoteCache | None:
        """The remote cache, if there is one. No call has been made yet."""
        settings = self.settings
        if not settings.remote_cache:
            return None
        settings.check_files((*REMOTE_FILES, "credential_helper"))
        tokens = (settings.bearer_token_file, settings.credential_helper, settings.netrc)
        if sum(value is not None for value in tokens) > 1:
            raise InvalidArgument("give one of --bearer-token-file, --credential-helper and --netrc only")
        call_s = settings.remote_timeout
        if call_s <= 0:
            raise InvalidArgument("--remote-timeout must be above 0")
        load_grpc()
        from snaploader.remote import RemoteCache, RetryPolicy, Timeouts

        usual = Timeouts()
        return self.enter_context(
            RemoteCache(
                settings.remote_cache,
                instance_name=settings.remote_instance_name,
                headers=settings.remote_header,
                tls=self._tls(),
                timeouts=Timeouts(min(usual.connect_s, call_s), call_s, idle_s=min(usual.idle_s, call_s)),
                retry=RetryPolicy(attempts=settings.remote_retries + 1),
                digest_function=settings.function,
                compression=settings.remote_cache_compression,
                credential_helper=settings.credential_helper,
                netrc=settings.netrc,
                bearer_token=read_secret(settings.bearer_token_file),
                on_retry=self._tell_retry,
                observer=self.observer,
            )
        )

    def loader(self, **options: Any) -> SnapshotLoader:
        """A loader over the caches; `options` are further arguments of SnapshotLoader."""
        from snaploader.loader import SnapshotLoader

        function = self.settings.function
        if function is not None:
            options["digest_function"] = function
        readonly = self.settings.remote_readonly
        loader = SnapshotLoader(
            self.file_cache, self.remote_cache, remote_readonly=readonly, observer=self.observer, **options
        )
        return self.enter_context(loader)

    def missing_remotely(self, digests: Collection[Digest]) -> set[Digest] | None:
        """Which blobs the remote cache lacks; None without one, or with a warning when it cannot be asked."""
        remote = self.remote_cache
        if remote is None:
            return None
        try:
            known = remote.digest_function
            foreign = {digest for digest in digests if digest.function is not known}
            return foreign | remote.find_missing([digest for digest in digests if digest not in foreign])
        except SnaploaderError as error:
            self.output.warn(f"cannot ask the remote cache for blobs: {error.message}")
            return None

    def _tls(self) -> TLSConfig | None:
        settings = self.settings
        certificate, key = settings.tls_client_certificate, settings.tls_client_key
        if (certificate is None) != (key is None):
            raise InvalidArgument(
                "--tls-client-certificate and --tls-client-key go together: give both or neither"
            )
        if settings.tls_certificate is None and certificate is None and not settings.tls_server_name:
            return None
        from snaploader.remote import TLSConfig

        return TLSConfig(settings.tls_certificate, certificate, key, settings.tls_server_name)

    def _tell_retry(self, event: RetryEvent) -> None:
        self.output.wait(
            f"{event.operation}: attempt {event.attempt} failed ({event.error.message}), "
            f"trying again in {format_time(event.delay_s)}"
        )


def read_secret(path: Path | None) -> str | None:
    """The text of a small file, without the line break at its end."""
    if path is None:
        return None
    with translate_os_errors(f"cannot read the token file {str(path)!r}"), path.open("rb") as file:
        data = file.read(MAX_SECRET_BYTES + 1)
    try:
        token = data.decode().strip()
    except UnicodeDecodeError:
        raise InvalidArgument(f"the token file {str(path)!r} is not text") from None
    if not token or len(data) > MAX_SECRET_BYTES or "\n" in token:
        raise InvalidArgument(f"the token file {str(path)!r} must hold one line, the token")
    return token


@dataclass(frozen=True, slots=True)
class WorkspaceSettings:
    """Where workspaces are, by the names of the options' parameters."""

    catalog: str = field(repr=False)
    """A path or a URL, which may hold a password."""
    state_dir: Path | None
    host_name: str

    @property
    def state_folder(self) -> Path:
        if self.state_dir is not None:
            return self.state_dir
        import platformdirs

        return platformdirs.user_state_path("snaploader", appauthor=False)

    @property
    def has_catalog(self) -> bool:
        """Whether a catalog is named, or there is one in the state directory."""
        return bool(self.catalog) or (self.state_folder / CATALOG_FILE).exists()


class Workspaces:
    """Catalog, runtime and manager of one command; they end with its caches. For one thread."""

    def __init__(self, caches: Caches, settings: WorkspaceSettings) -> None:
        self.caches = caches
        self.output = caches.output
        self.settings = settings

    @property
    def host(self) -> str:
        """What the catalog calls this host. The manager, which says so too, takes longer to import."""
        return self.settings.host_name or os.uname().nodename

    @cached_property
    def catalog(self) -> Catalog:
        from snaploader.workspace import Catalog

        url = self.settings.catalog or str(self._folder() / CATALOG_FILE)
        return self.caches.enter_context(Catalog.open(url))

    @cached_property
    def runtime(self) -> ProcessRuntime:
        from snaploader.workspace import ProcessRuntime

        return self.caches.enter_context(ProcessRuntime(self._folder() / "runtime"))

    @cached_property
    def manager(self) -> WorkspaceManager:
        catalog = self.catalog  # first: it tells best what is missing
        from snaploader.workspace import WorkspaceManager

        manager = WorkspaceManager(
            catalog,
            self.caches.loader(),
            self.caches.file_cache,
            self.runtime,
            self._folder(),
            host=self.settings.host_name,
            instance_name=self.caches.settings.remote_instance_name,
        )
        return self.caches.enter_context(manager)

    def _folder(self) -> Path:
        folder = self.settings.state_folder
        with translate_os_errors(f"cannot use the state directory {str(folder)!r}"):
            open_private(str(folder), "the state directory")
        return folder
