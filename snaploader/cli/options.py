"""The options that commands share, and how they reach a command.

Every option is looked for on the command line, in the environment as SNAPLOADER_ and its name in
capitals, in the configuration file, and has a default otherwise. The shared ones may stand before or
after the name of the command.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import click
from click.core import ParameterSource

from snaploader.cli.commands import FILE, SHARED, WHICH, WORKSPACES, option
from snaploader.cli.config import ConfigFile, default_path
from snaploader.cli.output import Output
from snaploader.cli.resources import Caches, Settings, Workspaces, WorkspaceSettings
from snaploader.cli.values import DURATION, KEY_VALUE, MODE, Size
from snaploader.errors import InvalidArgument
from snaploader.policy import PolicyOverrides, ReadPolicy, SavePolicy
from snaploader.task import SnapshotTask

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Invocation:
    """One run of the program, as `ctx.obj`."""

    output: Output
    """How it wants to print, as far as that is known."""


def _load_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> Path | None:
    """Runs before other options of a command are looked at, and sets their defaults."""
    root = ctx.find_root()
    assert isinstance(root.command, click.Group)
    if ctx is not root and ctx.get_parameter_source("config") is not ParameterSource.COMMANDLINE:
        return path  # a command that this one is in has loaded it
    if path is None and default_path().is_file():
        path = default_path()
    if path is not None:
        loaded = ConfigFile(path, SHARED_OPTIONS)
        loaded.check(root.command)
        ctx.default_map = loaded.defaults(root.command, _command_path(ctx))
    return path


def _command_path(ctx: click.Context) -> list[str]:
    path: list[str] = []
    while ctx.parent is not None:
        path.insert(0, str(ctx.info_name))
        ctx = ctx.parent
    return path


_shared = functools.partial(option, section=SHARED)
_which = functools.partial(option, section=WHICH)
_where = functools.partial(option, section=WORKSPACES)

_COMMON = (
    _shared(
        "--config",
        type=FILE,
        is_eager=True,
        expose_value=False,
        callback=_load_config,
        metavar="FILE",
        help="Configuration file.  [default: $XDG_CONFIG_HOME/snaploader/config.toml, if there]",
    ),
    _shared(
        "--cache-dir", type=FILE, help="Folder of the local cache.  [default: $XDG_CACHE_HOME/snaploader]"
    ),
    _shared("--max-cache-size", type=Size(1), default="10GiB", help="Bound on the local cache's size."),
    _shared(
        "--cache-mode",
        type=MODE,
        default="0700",
        help="Who may use the local cache, as the mode of its folders: 2770 for a group.",
    ),
    _shared("--group-id", default="", help="Partition of the local cache; groups do not see each other."),
    _shared(
        "--remote-cache", default="", metavar="URL", help="REAPI server: grpc://, grpcs:// or unix: address."
    ),
    _shared("--remote-instance-name", default="", help="Instance on the server; part of every key."),
    _shared(
        "--remote-header", multiple=True, type=KEY_VALUE, help="Header of every remote call; repeatable."
    ),
    _shared("--remote-timeout", type=DURATION, default="60s", help="Deadline of one remote call."),
    _shared("--remote-retries", type=click.IntRange(0, 100), default=5, help="Retries of a remote call."),
    _shared(
        "--remote-cache-compression/--no-remote-cache-compression",
        default=True,
        help="Compress blobs on the wire where the server can.",
    ),
    _shared(
        "--remote-readonly", is_flag=True, help="Use what others shared remotely; publish nothing there."
    ),
    _shared("--bearer-token-file", type=FILE, help="File with a token that is sent as authorization."),
    _shared(
        # A Path would lose the "./" that keeps a name from being looked up on PATH.
        "--credential-helper",
        type=click.Path(),
        help="Program that is asked for headers (Bazel's protocol).",
    ),
    _shared("--netrc", type=FILE, help="File with a login for the server's host."),
    _shared("--tls-certificate", type=FILE, help="CA certificates (PEM) the server is checked with."),
    _shared("--tls-client-certificate", type=FILE, help="Own certificate (PEM), for mutual TLS."),
    _shared("--tls-client-key", type=FILE, help="Key (PEM) of the own certificate."),
    _shared(
        "--tls-server-name", default="", metavar="NAME", help="Name expected in the server's certificate."
    ),
    _shared(
        "--digest-function",
        type=click.Choice(["auto", "sha256", "blake3"], case_sensitive=False),
        default="auto",
        help="auto: BLAKE3, or what the server knows.",
    ),
    _shared("--json", "as_json", is_flag=True, help="Print one JSON object."),
    _shared("--quiet", "-q", is_flag=True, help="Say nothing on stderr but errors."),
    _shared("--verbose", "-v", count=True, help="Say more; -vv tells everything."),
)


def _decorated(function: F, decorators: Sequence[Callable[[F], F]]) -> F:
    """Apply decorators, the last one first, so that help lists options as they stand."""
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def _gathering(kind: type[Any], name: str, function: Callable[..., R]) -> Callable[..., R]:
    """Hand the options that a dataclass has fields for to `function` as one value of it, called `name`."""

    @functools.wraps(function)
    def with_value(*args: Any, **kwargs: Any) -> R:
        values = {field.name: kwargs.pop(field.name) for field in fields(kind)}
        return function(*args, **{name: kind(**values)}, **kwargs)

    return with_value


def shared_options(function: F) -> F:
    """The options of all commands, for a function that reads them with `settings_of`."""
    return _decorated(function, _COMMON)


def common(function: Callable[Concatenate[Caches, P], R]) -> Callable[P, R]:
    """The options of all commands; the function gets `Caches` made from them, which end with it."""

    @click.pass_context
    @functools.wraps(function)
    def with_caches(ctx: click.Context, /, *args: P.args, **kwargs: P.kwargs) -> R:
        for name in (*(field.name for field in fields(Settings)), "as_json", "quiet", "verbose"):
            kwargs.pop(name, None)
        output = output_of(ctx)
        if isinstance(ctx.obj, Invocation):
            ctx.obj.output = output
        settings = settings_of(ctx)
        settings.check_files([field.name for field in fields(Settings) if _said(ctx, field.name) is not None])
        with Caches(settings, output) as caches, output.logging():
            return function(caches, *args, **kwargs)

    return shared_options(with_caches)


def output_of(ctx: click.Context) -> Output:
    """How this invocation wants to print."""
    return Output(
        as_json=bool(_effective(ctx, "as_json")),
        quiet=bool(_effective(ctx, "quiet")),
        verbose=int(_effective(ctx, "verbose") or 0),
    )


def settings_of(ctx: click.Context) -> Settings:
    """The values of the shared options."""
    return Settings(**{field.name: _effective(ctx, field.name) for field in fields(Settings)})


def _effective(ctx: click.Context, name: str) -> Any:
    """The command's value, unless only the command line before the command's name says something."""
    return (_said(ctx, name) or ctx).params.get(name)


def _said(ctx: click.Context, name: str) -> click.Context | None:
    """Where on the command line a parameter is: after the command, or after a group that it is in."""
    at: click.Context | None = ctx
    while at is not None and at.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
        at = at.parent
    return at


def first_given(*values: float | None) -> float:
    """The first that is not None; the last one must not be."""
    return next(value for value in values if value is not None)


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Which snapshots a command is about."""

    ref: str
    base_ref: str
    default_ref: str
    platform: tuple[tuple[str, str], ...]
    configuration_hash: str
    runner_id: str
    share: bool
    universal_fallback: bool

    @property
    def wishes(self) -> PolicyOverrides:
        """What the platform properties say of policy; options that are given win."""
        return PolicyOverrides.from_platform(self.platform)

    def task(self, settings: Settings, *, need_ref: bool = True) -> SnapshotTask:
        """The task whose keys are meant. InvalidArgument when the options do not name one."""
        share = self.share and self.wishes.share is not False
        if need_ref and share and not self.ref:
            raise InvalidArgument("--ref is missing: name the branch (or use --no-share with --runner-id)")
        if not share and not self.runner_id:
            raise InvalidArgument("--no-share needs --runner-id: snapshots then belong to one runner")
        environment = {
            "GIT_BRANCH": self.ref,
            "GIT_BASE_BRANCH": self.base_ref,
            "GIT_REPO_DEFAULT_BRANCH": self.default_ref,
        }
        return SnapshotTask(self.platform, environment, settings.remote_instance_name)


_TASK = (
    _which("--ref", default="", metavar="BRANCH", help="The branch."),
    _which("--base-ref", default="", metavar="BRANCH", help="The branch it goes back to: first fallback."),
    _which(
        "--default-ref", default="", metavar="BRANCH", help="The repository's default branch: next fallback."
    ),
    _which("--platform", multiple=True, type=KEY_VALUE, help="Platform property; repeatable."),
    _which(
        "--configuration-hash", default="", metavar="HASH", help="Hash of all else that makes the machine."
    ),
    _which("--runner-id", default="", metavar="ID", help="The runner, where snapshots are not shared."),
    _which("--share/--no-share", default=True, help="Share snapshots between runners, by branch."),
    _which(
        "--universal-fallback/--no-universal-fallback",
        default=False,
        help="Keep and use a snapshot of any branch as the last fallback.",
    ),
)


def task_options(function: Callable[..., R]) -> Callable[..., R]:
    """The options that name a task's snapshots; the function gets them as `task_options`."""
    return _decorated(_gathering(TaskOptions, "task_options", function), _TASK)


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How a snapshot is looked for."""

    snapshot_id: str
    read_policy: str | None
    max_stale_fallback_age: float | None
    allow_degraded: bool


_READ = (
    _which("--snapshot-id", default="", metavar="ID", help="Exactly this snapshot, whatever its branch."),
    _which(
        "--read-policy",
        type=click.Choice([str(policy) for policy in ReadPolicy]),
        help="Which manifest is taken where there are two.  [default: local-first]",
    ),
    _which(
        "--max-stale-fallback-age",
        type=DURATION,
        help="Local snapshots of fallbacks that are older are passed over.  [default: 24h]",
    ),
    _which("--allow-degraded", is_flag=True, help="Take a fallback when a better branch cannot be asked."),
)


def read_options(function: Callable[..., R]) -> Callable[..., R]:
    """The options of looking for a snapshot; the function gets them as `read_options`."""
    return _decorated(_gathering(ReadOptions, "read_options", function), _READ)


_SAVE = (
    option(
        "--save-policy",
        type=click.Choice([str(policy) for policy in SavePolicy]),
        help="Whether a snapshot that stands remotely is replaced.  [default: always]",
    ),
    option(
        "--min-refresh-interval",
        type=DURATION,
        help="Leave the default branch's remote snapshot alone when it is younger.  [default: 0s]",
    ),
)


def save_options(function: F) -> F:
    """What is saved remotely, and when; the function gets `save_policy` and `min_refresh_interval`."""
    return _decorated(function, _SAVE)


_WORKSPACES = (
    _where(
        "--catalog",
        default="",
        metavar="URL",
        help="Database of workspaces: a file (SQLite), or postgresql://user@host/database.  "
        "[default: catalog.sqlite in --state-dir]",
    ),
    _where(
        "--state-dir",
        type=FILE,
        metavar="DIR",
        help="Folder of this host's workspaces.  [default: $XDG_STATE_HOME/snaploader]",
    ),
    _where(
        "--host-name",
        default="",
        metavar="NAME",
        help="What the catalog calls this host.  [default: hostname]",
    ),
)


def workspace_options(function: F) -> F:
    """Where workspaces are, for a function that reads it with `workspace_settings_of`."""
    return _decorated(function, _WORKSPACES)


def workspace_settings_of(ctx: click.Context) -> WorkspaceSettings:
    """Where workspaces are."""
    names = (field.name for field in fields(WorkspaceSettings))
    return WorkspaceSettings(**{name: _effective(ctx, name) for name in names})


def with_workspaces(function: Callable[Concatenate[Workspaces, P], R]) -> Callable[P, R]:
    """The options of all commands and where workspaces are; the function gets what is made from them."""

    @functools.wraps(function)
    def opened(caches: Caches, /, *args: P.args, **kwargs: P.kwargs) -> R:
        for item in fields(WorkspaceSettings):
            kwargs.pop(item.name, None)
        settings = workspace_settings_of(click.get_current_context())
        try:
            return function(Workspaces(caches, settings), *args, **kwargs)
        except KeyboardInterrupt as interrupt:
            workspace_id = kwargs.get("workspace_id")
            look = f"show {workspace_id}" if workspace_id else "ls"
            interrupt.add_note(
                "an operation that had begun was finished, or taken back: look with "
                f"`snaploader workspace {look}`"
            )
            raise

    return workspace_options(common(opened))


def _shared_by_name() -> dict[str, click.Option]:
    def bare() -> None: ...

    function: Callable[..., Any] = bare
    for decorate in (*_COMMON, *_TASK, *_READ, *_SAVE, *_WORKSPACES):
        function = decorate(function)
    shared = {option.opts[0].removeprefix("--"): option for option in function.__click_params__}  # type: ignore[attr-defined]
    return {name: option for name, option in shared.items() if name != "config"}


SHARED_OPTIONS = _shared_by_name()
"""Options that several commands may have, by long name: what may stand at the top of a configuration file."""
