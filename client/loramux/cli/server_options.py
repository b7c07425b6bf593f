"""The server's options as flags: one flag per option of `loramux_server.config`, none of them written twice.

A flag that was not given is None, so that the environment and the file below it show through.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from loramux.terminal.output import say

if TYPE_CHECKING:
    from loramux_server.config import Option

# What Kubernetes sets in every pod beside a service that is named loramux.
_OF_KUBERNETES = re.compile(r"LORAMUX_(SERVICE_|PORT$|PORT_)")

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="LORAMUX_CONFIG", help="YAML file of options.", show_envvar=True),
]
_TAKING: set[Callable[..., None]] = set()


class ServerOptionsGroup(TyperGroup):
    """A group whose commands may be `with_server_options`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        function = getattr(command and command.callback, "__wrapped__", None)
        if function not in _TAKING:
            return name, command, rest
        alone = typer.Typer(add_completion=False)
        alone.command(name)(_with_flags(function))
        return name, typer.main.get_command(alone), rest


def with_server_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command of a ServerOptionsGroup every server option as a flag; it receives them as its `flags` mapping,
    unset ones as None.

    The group adds them when it comes to this command: the model of the options is imported for no other.
    """
    _TAKING.add(function)
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "flags"]
    function.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    return function


def _with_flags(function: Callable[..., None]) -> Callable[..., None]:
    from loramux_server.config import groups, options

    headings = groups()
    flags = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, option, headings[name])
        )
        for name, option in options().items()
    ]

    def command(**values: Any) -> None:
        for warning in unknown_variables(os.environ):
            say(f"warning: {warning}")
        function(flags={flag.name: values.pop(flag.name) for flag in flags}, **values)

    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature([*inspect.signature(function).parameters.values(), *flags])  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def _annotation(name: str, option: Option, heading: str) -> Any:
    flag = "--" + name.replace("_", "-")
    text = option.text
    if option.choices:
        text += f" ({', '.join(option.choices)})"
    if option.default is not None:
        text += f"; default {default_text(option.default)}"
    if option.kind == "flag":
        yes_no = typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False, rich_help_panel=heading)
        return Annotated[bool | None, yes_no]
    metavar = option.kind.upper()
    valued = typer.Option(flag, help=text, metavar=metavar, show_default=False, rich_help_panel=heading)
    return Annotated[str | None, valued]


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A sentence for each LORAMUX_* variable that no option and no command reads, with the nearest known one."""
    from loramux_server.config import ENV_PREFIX, FILE_VARIABLE, options

    known = [*(ENV_PREFIX + name.upper() for name in options()), FILE_VARIABLE, "LORAMUX_ADDRESS"]
    found = []
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or name in known or _OF_KUBERNETES.match(name):
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "`loramux config show` lists every option"
        found.append(f"{name} is not an option and is ignored; {hint}")
    return found


def default_text(value: object) -> str:
    """As `option_text`, but a path below the home directory is written from `~`: a default is nobody's own."""
    if isinstance(value, Path) and value.is_relative_to(Path.home()):
        return f"~/{value.relative_to(Path.home())}"
    return option_text(value)


def option_text(value: object) -> str:
    """A value as YAML and flags spell it; nothing for an unset one."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
