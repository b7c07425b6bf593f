"""The public API: `from loramux import Client, AsyncClient`.

The one package `__init__` of the project that is not empty. The two names load on first use, so that
`loramux --help` pays for neither gRPC nor protobuf.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramux.aio import AsyncClient
    from loramux.client import Client

__all__ = ["AsyncClient", "Client"]

_HOMES = {"AsyncClient": "loramux.aio", "Client": "loramux.client"}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
