"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from lorica.channel import DEFAULT_ADDRESS

Address = Annotated[str, typer.Option("--address", "-a", envvar="LORICA_ADDRESS", help="Server as HOST:PORT.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout instead of a table.")]

__all__ = ["DEFAULT_ADDRESS", "Address", "AsJson"]
