"""Commands, groups of them that are imported on demand, and the options that they share.

Every option is looked for on the command line, in the environment as SNAPLOADER_ and its name in
capitals, in the configuration file, and has a default otherwise. The shared ones may stand before or
after the name of the command.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import click
from click.core import ParameterSource

from snaploader.cli.config import ConfigFile, default_path, environment_variable, long_name, options_of
from snaploader.cli.output import Output
from snaploader.cli.resources import Caches, Settings, Workspaces, WorkspaceSettings
from snaploader.cli.values import DURATION, KEY_VALUE, MODE, size_type
from snaploader.errors import InvalidArgument
from snaploader.policy import PolicyOverrides, ReadPolicy, ReadSources, SavePolicy

if TYPE_CHECKING:
    from snaploader.keys import SnapshotTask

P = ParamSpec("P")
R = TypeVar("R")
V = TypeVar("V")
F = TypeVar("F", bound=Callable[..., Any])

OWN = "Options"
WHICH = "Which snapshot"
WORKSPACES = "Where workspaces are"
SHARED = "Options of all commands"

FILE = click.Path(path_type=Path)


class Option(click.Option):
    """An option that knows under which heading of the help it is listed."""

    def __init__(self, *args: Any, section: str = OWN, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.section = section

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The option's line in the help. An on/off option defaults to yes or no, where click names a flag."""
        record = super().get_help_record(ctx)
        if record is None or not self.secondary_opts:
            return record
        names, text = record
        # Asked for here: click 8.1 names the flag of the option's own default, whatever the file says.
        word = "yes" if self.get_default(ctx) else "no"
        for flags in (self.opts, self.secondary_opts):
            text = text.replace(f"default: {flags[0].lstrip('-')}]", f"default: {word}]")
        return names, text

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """The option as messages name it, and the variable where the value came from one."""
        hint = click.Parameter.get_error_hint(self, ctx)  # type: ignore[arg-type,unused-ignore]
        if ctx is not None and ctx.get_parameter_source(str(self.name)) is ParameterSource.ENVIRONMENT:
            hint += f" (from {self.envvar})"
        return hint


class Command(click.Command):
    """A command whose help lists its own options first, and those that it shares under headings.

    Args:
        scope: The whole name of the command, which is in the environment variables of its own options.
    """

    def __init__(self, *args: Any, scope: str = "", **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        for param in self.params:
            if isinstance(param, Option) and param.envvar is None:
                param.envvar = environment_variable(long_name(param), scope)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _set_defaults(ctx)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {OWN: [], WHICH: [], WORKSPACES: [], SHARED: []}
        for param in self.get_params(ctx):
            # Recent versions of click have records of arguments too; the usage line shows those.
            record = None if isinstance(param, click.Argument) else param.get_help_record(ctx)
            if record is not None:
                sections[param.section if isinstance(param, Option) else SHARED].append(record)
        for section, records in sections.items():
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)


class NoCommand(click.UsageError):
    """A group of commands stands alone. Its help is the message."""


class CommandsOnDemand(Mapping[str, click.Command]):
    """Commands by name, each imported when it is asked for.

    Args:
        package: The package that they are in.
        homes: Module and attribute of each command, as in "cache:cache", and the line that the help of its
            group has about it.
    """

    def __init__(self, package: str, homes: Mapping[str, tuple[str, str]]) -> None:
        self._package = package
        self.homes = homes

    def __getitem__(self, name: str) -> click.Command:
        module, _, attribute = self.homes[name][0].partition(":")
        command: click.Command = getattr(import_module(f"{self._package}.{module}"), attribute)
        return command

    def __contains__(self, name: object) -> bool:
        return name in self.homes

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __len__(self) -> int:
        return len(self.homes)


class Group(click.Group):
    """A group of commands that tells which there are when it stands alone.

    Args:
        on_demand: Its commands, where they are in modules of their own.
    """

    def __init__(self, *args: Any, on_demand: CommandsOnDemand | None = None, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        if on_demand is not None:
            self.commands = on_demand  # type: ignore[assignment]  # nothing is added to them

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            raise NoCommand(f"{ctx.command_path} needs the name of a command: see --help", ctx)
        _set_defaults(ctx)
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        commands: object = self.commands
        if not isinstance(commands, CommandsOnDemand):
            super().format_commands(ctx, formatter)
            return
        with formatter.section("Commands"):
            formatter.write_dl([(name, commands.homes[name][1]) for name in sorted(commands)])


def option(*names: str, section: str = OWN, shared: bool = False, **attributes: Any) -> Callable[[F], F]:
    """A click option with its environment variable. Its help shows the default, unless that is empty.

    Args:
        section: Heading in the help.
        shared: Several commands have it, and one variable for all of them.
    """
    if shared:
        long = next(name for name in names if name.startswith("--"))
        attributes["envvar"] = environment_variable(long.partition("/")[0].removeprefix("--"))
    attributes.setdefault("show_default", attributes.get("default") not in {None, ""})
    return click.option(*names, cls=Option, section=section, show_envvar=True, **attributes)


def destructive(function: F) -> F:
    """`--yes` and `--dry-run`, of a command that removes things and asks first; see `Output.must_ask`."""
    yes = option("--yes", "-y", is_flag=True, help="Do not ask, on a terminal either.")
    dry_run = option("--dry-run", is_flag=True, help="Only say what would go.")
    return yes(dry_run(function))


def _load_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> Path | None:
    """Runs before other options of a command are looked at, and sets their defaults."""
    root = ctx.find_root()
    assert isinstance(root.command, click.Group)
    if ctx is not root and ctx.get_parameter_source("config") is not ParameterSource.COMMANDLINE:
        return path  # a command that this one is in has loaded it
    if path is None and default_path().is_file():
        path = default_path()
    if path is not None:
        ctx.meta[_CONFIG] = ConfigFile(path, root.command, SHARED_OPTIONS)
        _set_defaults(ctx)
    return path


def _set_defaults(ctx: click.Context) -> None:
    """Give the options of a command the defaults that the file has, if one was loaded."""
    if _CONFIG in ctx.meta:
        ctx.default_map = ctx.meta[_CONFIG].defaults(ctx.command_path.split()[1:])


_CONFIG = f"{__name__}.config"
"""The `ConfigFile`, in what the contexts of a command and of its groups share."""


_shared = functools.partial(option, section=SHARED, shared=True)
_which = functools.partial(option, section=WHICH, shared=True)
_where = functools.partial(option, section=WORKSPACES, shared=True)

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
    _shared("--max-cache-size", type=size_type(1), default="10GiB", help="Bound on the local cache's size."),
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
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def _gathering(kind: type[Any], name: str, function: Callable[..., R]) -> Callable[..., R]:
    """Hand the options that a dataclass has fields for to `function` as one value of it, called `name`."""

    @functools.wraps(function)
    def with_value(*args: Any, **kwargs: Any) -> R:
        return function(*args, **{name: _taken(kind, kwargs)}, **kwargs)

    return with_value


def shared_options(function: F) -> F:
    """The options of all commands, for a group of them."""
    return _decorated(function, _COMMON)


def workspace_options(function: F) -> F:
    """Where workspaces are, for a group of commands that say it."""
    return _decorated(function, _WORKSPACES)


def command(
    path: str, *, group: click.Group | None = None, cls: type[Command] = Command, **attributes: Any
) -> Callable[[Callable[Concatenate[Caches, P], None]], Command]:
    """A command with the options of all; its function gets `Caches` made from them, which end with it.

    Args:
        path: Its whole name, as in "cache ls".
        group: Where it is put, unless that imports it on demand.
    """

    def decorate(function: Callable[Concatenate[Caches, P], None]) -> Command:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            ctx = click.get_current_context()
            output, wanted = ctx.ensure_object(Output), _taken(Output, kwargs)
            output.as_json, output.quiet, output.verbose = wanted.as_json, wanted.quiet, wanted.verbose
            settings = _taken(Settings, kwargs)
            settings.check_files([name for name in _names(Settings) if _said(ctx, name) is not None])
            with Caches(settings, output) as caches, output.logging():
                function(caches, *args, **kwargs)

        name = path.rpartition(" ")[2]
        made = click.command(name, cls=cls, scope=path, **attributes)(shared_options(run))
        if group is not None:
            group.add_command(made)
        return made

    return decorate


def workspace_command(
    path: str, **attributes: Any
) -> Callable[[Callable[Concatenate[Workspaces, P], None]], Command]:
    """A command that also says where workspaces are; its function gets what is made from the options."""

    def decorate(function: Callable[Concatenate[Workspaces, P], None]) -> Command:
        @functools.wraps(function)
        def run(caches: Caches, /, *args: P.args, **kwargs: P.kwargs) -> None:
            settings = _taken(WorkspaceSettings, kwargs)
            try:
                function(Workspaces(caches, settings), *args, **kwargs)
            except KeyboardInterrupt as interrupt:
                workspace_id = kwargs.get("workspace_id")
                look = f"show {workspace_id}" if workspace_id else "ls"
                interrupt.add_note(
                    "an operation that had begun was finished, or taken back: look with "
                    f"`snaploader workspace {look}`"
                )
                raise

        return command(path, **attributes)(workspace_options(run))

    return decorate


def _names(kind: type[Any]) -> list[str]:
    return [field.name for field in fields(kind)]


def _taken(kind: type[V], kwargs: dict[str, Any]) -> V:
    """The options that a dataclass has fields for, as a value of it; they are taken out of `kwargs`.

    The value of an option is the command's, unless only the command line before its name says something.
    """
    ctx = click.get_current_context()
    values = {}
    for name in _names(kind):
        values[name] = (_said(ctx, name) or ctx).params[name]
        kwargs.pop(name, None)
    return kind(**values)


def _said(ctx: click.Context, name: str) -> click.Context | None:
    """Where on the command line a parameter is: after the command, or after a group that it is in."""
    at: click.Context | None = ctx
    while at is not None and at.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
        at = at.parent
    return at


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
        from snaploader.keys import SnapshotTask

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
class ReadOptions(TaskOptions):
    """Which snapshot is looked for, and how."""

    snapshot_id: str
    read_policy: str | None
    max_stale_fallback_age: float | None
    without: tuple[str, ...]
    allow_degraded: bool

    @property
    def sources(self) -> ReadSources:
        """What may be read where. InvalidArgument when nothing is left."""
        return ReadSources(**{source.replace("-", "_"): False for source in self.without})


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
    _which(
        "--without",
        multiple=True,
        type=click.Choice([field.name.replace("_", "-") for field in fields(ReadSources)]),
        help="Read none of these; repeatable.",
    ),
    _which("--allow-degraded", is_flag=True, help="Take a fallback when a better branch cannot be asked."),
)


def read_options(function: Callable[..., R]) -> Callable[..., R]:
    """The options of looking for a snapshot; the function gets them as `read_options`."""
    return _decorated(_gathering(ReadOptions, "read_options", function), (*_TASK, *_READ))


_SAVE = (
    option(
        "--save-policy",
        shared=True,
        type=click.Choice([str(policy) for policy in SavePolicy]),
        help="Whether a snapshot that stands remotely is replaced.  [default: always]",
    ),
    option(
        "--min-refresh-interval",
        shared=True,
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


_ALL = click.command(_decorated(lambda: None, (*_COMMON, *_TASK, *_READ, *_SAVE, *_WORKSPACES)))
SHARED_OPTIONS = options_of(_ALL)
"""Options that several commands may have, by long name: what may stand at the top of a configuration file."""
