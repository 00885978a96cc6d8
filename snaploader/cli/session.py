"""What a command works with: caches and a loader, made from the options when they are first asked for."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from snaploader.cli.output import Output
from snaploader.cli.values import check_file, format_time
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import InvalidArgument, SnaploaderError, translate_os_errors
from snaploader.filecache import FileCache
from snaploader.loader.loader import DEFAULT_DIGEST_FUNCTION, SnapshotLoader
from snaploader.remote import RemoteCache, RetryEvent, RetryPolicy, Timeouts, TLSConfig

MAX_SECRET_BYTES = 64 << 10

REMOTE_FILES = ("bearer_token_file", "netrc", "tls_certificate", "tls_client_certificate", "tls_client_key")
"""Settings that name files which the remote cache needs. --credential-helper is a program instead."""


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
        """The folder of the local cache."""
        if self.cache_dir is not None:
            return self.cache_dir
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        return Path(base, "snaploader")

    @property
    def function(self) -> DigestFunction | None:
        """The digest function asked for; None leaves it to the server."""
        return None if self.digest_function == "auto" else DigestFunction.parse(self.digest_function)

    def check_files(self, names: Collection[str] | None = None) -> None:
        """InvalidArgument when a file for the remote cache is missing.

        Args:
            names: Look at these settings only.
        """
        for name in REMOTE_FILES:
            path: Path | None = getattr(self, name)
            if path is not None and (names is None or name in names):
                check_file(option_name(name), path)
        helper = self.credential_helper
        if helper is None or not (names is None or "credential_helper" in names):
            return
        if shutil.which(helper) is None:
            raise InvalidArgument(f"--credential-helper: {helper!r} is no program that can be run")


class Session:
    """Caches and loaders of one command, closed in reverse order at its end. For one thread."""

    def __init__(self, settings: Settings, output: Output) -> None:
        self.settings = settings
        self.output = output
        self._open = contextlib.ExitStack()

    @cached_property
    def file_cache(self) -> FileCache:
        """The local cache."""
        settings = self.settings
        return self._open.enter_context(
            FileCache(
                settings.cache_folder,
                max_bytes=settings.max_cache_size,
                cache_mode=settings.cache_mode,
                group_id=settings.group_id,
            )
        )

    @cached_property
    def remote_cache(self) -> RemoteCache | None:
        """The remote cache, if there is one. No call has been made yet."""
        settings = self.settings
        if not settings.remote_cache:
            return None
        settings.check_files()
        tokens = (settings.bearer_token_file, settings.credential_helper, settings.netrc)
        if sum(value is not None for value in tokens) > 1:
            raise InvalidArgument("give one of --bearer-token-file, --credential-helper and --netrc only")
        return self._open.enter_context(
            RemoteCache(
                settings.remote_cache,
                instance_name=settings.remote_instance_name,
                headers=settings.remote_header,
                tls=self._tls(),
                timeouts=self._timeouts(),
                retry=RetryPolicy(attempts=settings.remote_retries + 1),
                digest_function=settings.function,
                compression=settings.remote_cache_compression,
                credential_helper=settings.credential_helper,
                netrc=settings.netrc,
                bearer_token=read_secret(settings.bearer_token_file),
                on_retry=self._tell_retry,
            )
        )

    def loader(self, **options: Any) -> SnapshotLoader:
        """A loader over the caches; `options` are further arguments of SnapshotLoader."""
        return self._open.enter_context(
            SnapshotLoader(
                self.file_cache,
                self.remote_cache,
                digest_function=self.settings.function or DEFAULT_DIGEST_FUNCTION,
                remote_readonly=self.settings.remote_readonly,
                **options,
            )
        )

    def enter(self, context: contextlib.AbstractContextManager[Any]) -> Any:
        """Enter a context manager that is to end with the session, before the caches do."""
        return self._open.enter_context(context)

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
        return TLSConfig(settings.tls_certificate, certificate, key, settings.tls_server_name)

    def _timeouts(self) -> Timeouts:
        call = self.settings.remote_timeout
        if call <= 0:
            raise InvalidArgument("--remote-timeout must be above 0")
        defaults = Timeouts()
        return Timeouts(
            connect_s=min(defaults.connect_s, call), call_s=call, idle_s=min(defaults.idle_s, call)
        )

    def _tell_retry(self, event: RetryEvent) -> None:
        self.output.wait(
            f"{event.operation}: attempt {event.attempt} failed ({event.error.message}), "
            f"trying again in {format_time(event.delay_s)}"
        )

    def close(self) -> None:
        """Close what was opened."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)


def option_name(setting: str) -> str:
    """The option on the command line that a setting comes from."""
    return "--" + setting.replace("_", "-")


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
