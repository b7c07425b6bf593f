"""Flags and commands as they were called before: refused with the present name."""

from __future__ import annotations

from collections.abc import Sequence

import typer

_FLAGS = {"--materialised-bytes": "--merged-bytes"}
_COMMANDS = {"adapters materialise": "adapters merge"}


def refuse_renamed(args: Sequence[str]) -> None:
    """Raises BadParameter for a command line of former names."""
    command = " ".join(args[:2])
    if command in _COMMANDS:
        raise typer.BadParameter(f"`{command}` was renamed to `{_COMMANDS[command]}`")
    for flag in (argument.partition("=")[0] for argument in args):
        if flag in _FLAGS:
            raise typer.BadParameter(f"{flag} was renamed to {_FLAGS[flag]}")
