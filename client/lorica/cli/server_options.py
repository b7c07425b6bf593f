"""The server's options as flags: one flag per option of `lorica_server.config`, none of them written twice.

A flag that was not given is None, so that the environment and the file below it show through.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lorica_server.config import defaults, options
from lorica_server.options import Option

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="LORICA_CONFIG", help="YAML file of options.", show_envvar=True),
]


def with_server_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command every server option as a flag; it receives them as its `flags` mapping, unset ones as None."""
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "flags"]
    known = options()

    def command(**values: Any) -> None:
        flags = {name: values.pop(name) for name in known}
        function(flags=flags, **values)

    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    command.__signature__ = inspect.Signature(own + _parameters(known))  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def _parameters(known: Mapping[str, Option]) -> list[inspect.Parameter]:
    standard = defaults()
    return [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, option, standard[name])
        )
        for name, option in known.items()
    ]


def _annotation(name: str, option: Option, default: object) -> Any:
    flag = "--" + name.replace("_", "-")
    text = option.text
    if option.choices:
        text += f" ({', '.join(option.choices)})"
    if default is not None:
        text += f"; default {option_text(default)}"
    if option.kind == "flag":
        return Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False)]
    return Annotated[str | None, typer.Option(flag, help=text, metavar=option.kind.upper(), show_default=False)]


def option_text(value: object) -> str:
    """A value as YAML and flags spell it; nothing for an unset one."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
