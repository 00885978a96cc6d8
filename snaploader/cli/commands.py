"""Commands, groups of them that are imported on demand, and options that know their environment variables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from snaploader.cli.config import environment_variable

F = TypeVar("F", bound=Callable[..., Any])

OWN = "Options"
WHICH = "Which snapshot"
WORKSPACES = "Where workspaces are"
SHARED = "Options of all commands"

FILE = click.Path(path_type=Path)


class Option(click.Option):
    """An option that knows under which heading it is listed."""

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
    """A command whose help lists its own options first, and those that it shares under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write all options to the help page."""
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
        homes: Module and attribute of each command, as in "cache:list_", and the line that the help of its
            group has about it.
    """

    def __init__(self, package: str, homes: Mapping[str, tuple[str, str]]) -> None:
        self._package = package
        self._homes = homes

    def __getitem__(self, name: str) -> click.Command:
        module, _, attribute = self._homes[name][0].partition(":")
        command: click.Command = getattr(import_module(f"{self._package}.{module}"), attribute)
        return command

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def help_lines(self) -> list[tuple[str, str]]:
        """What the help says of each, sorted by name. Nothing is imported."""
        return [(name, self._homes[name][1]) for name in sorted(self._homes)]


class Group(click.Group):
    """A group of commands that tells which there are when it stands alone.

    Args:
        on_demand: Its commands, where they are in modules of their own.
    """

    command_class = Command

    def __init__(self, *args: Any, on_demand: CommandsOnDemand | None = None, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        if on_demand is not None:
            self.commands = on_demand  # type: ignore[assignment]  # nothing is added to them

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments up to the command's name."""
        if not args and not ctx.resilient_parsing:
            raise NoCommand(f"{ctx.command_path} needs the name of a command: see --help", ctx)
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands to the help page."""
        commands: object = self.commands
        if isinstance(commands, CommandsOnDemand):
            with formatter.section("Commands"):
                formatter.write_dl(commands.help_lines())
        else:
            super().format_commands(ctx, formatter)


def option(*names: str, scope: str = "", section: str = OWN, **attributes: Any) -> Callable[[F], F]:
    """A click option with its environment variable. Its help shows the default, unless that is empty.

    Args:
        scope: Name of the command, for options that only one command has.
        section: Heading in the help.
    """
    long = next(name for name in names if name.startswith("--")).partition("/")[0].removeprefix("--")
    attributes.setdefault("show_default", attributes.get("default") not in {None, ""})
    return click.option(
        *names,
        cls=Option,
        section=section,
        envvar=environment_variable(long, scope),
        show_envvar=True,
        **attributes,
    )


def destructive(scope: str) -> Callable[[F], F]:
    """`--yes` and `--dry-run`, of a command that removes things and asks first; see `Output.must_ask`."""

    def decorate(function: F) -> F:
        yes = option("--yes", "-y", scope=scope, is_flag=True, help="Do not ask, on a terminal either.")
        dry_run = option("--dry-run", scope=scope, is_flag=True, help="Only say what would go.")
        return yes(dry_run(function))

    return decorate
