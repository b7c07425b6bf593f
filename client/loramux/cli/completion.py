"""Shell completion of adapter names, from the running server; none where it does not answer at once."""

from __future__ import annotations

import typer

from loramux.channel import DEFAULT_ADDRESS

_SECONDS = 1.0  # the shell waits this long


def complete_adapters(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names and aliases of adapters that begin with `incomplete`, from the server that the command line addresses."""
    from loramux.client import Client
    from loramux.errors import LoramuxError
    from loramux.retry import NO_RETRY

    try:
        with Client(ctx.params.get("address") or DEFAULT_ADDRESS, retry=NO_RETRY) as client:
            client.is_healthy(timeout=_SECONDS)
            known = [name for adapter in client.adapters() for name in (adapter.name, *adapter.aliases)]
    except LoramuxError:
        return []
    return sorted(name for name in known if name.startswith(incomplete))
