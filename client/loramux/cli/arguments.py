"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from loramux.channel import DEFAULT_ADDRESS
from loramux.terminal.failures import CommandError, ExitCode


def _check_address(address: str) -> str:
    scheme, separator, rest = address.partition("://")
    if separator and scheme in ("http", "https", "grpc", "grpcs"):
        raise CommandError(
            f"invalid address {address!r}: it is a URL",
            remedy=f"leave out {scheme}://, as in {rest.rstrip('/')}",
            code=ExitCode.USAGE,
        )
    if ":" not in address:
        raise CommandError(
            f"invalid address {address!r}: it has no port",
            remedy="-a/--address takes HOST:PORT or unix:PATH; an adapter is chosen with -A/--adapter",
            code=ExitCode.USAGE,
        )
    return address


Address = Annotated[
    str,
    typer.Option(
        "--address", "-a", envvar="LORAMUX_ADDRESS", help="Server as HOST:PORT or unix:PATH.", callback=_check_address
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout instead of a table.")]

__all__ = ["DEFAULT_ADDRESS", "Address", "AsJson"]
