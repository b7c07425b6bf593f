"""`loramux health`: grpc.health.v1 as an exit code, for containers and scripts."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

from loramux.cli.arguments import DEFAULT_ADDRESS, Address
from loramux.terminal.failures import ExitCode
from loramux.terminal.output import say


def command(
    address: Address = DEFAULT_ADDRESS,
    timeout: Annotated[float, typer.Option(min=0.05, help="Seconds to wait for the answer.")] = 5.0,
    wait: Annotated[float, typer.Option(min=0.0, help="Seconds to wait until it serves; 0 asks once.")] = 0.0,
) -> None:
    """Exit with 0 when the server serves, 1 when it does not yet or drains, 5 when it cannot be reached."""
    from loramux.client import Client
    from loramux.errors import Unavailable
    from loramux.retry import NO_RETRY

    with Client(address, retry=NO_RETRY) as client:
        if wait > 0:
            with suppress(Unavailable):  # asked once more below: a server that answers no is not one that is not there
                client.wait_healthy(wait)
        if not client.is_healthy(timeout=timeout):
            say(f"{address}: NOT_SERVING" + (f" after {wait:g} s" if wait else ""))
            raise typer.Exit(ExitCode.NO)
    say(f"{address}: SERVING")
