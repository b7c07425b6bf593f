"""How `loramux adapters` says when an adapter ends by itself."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loramux.types import Adapter

_UNITS = ((86_400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def describe_end(adapter: Adapter) -> str:
    """`in 59 s, 3 of 5 uses left`, or nothing where it stays."""
    parts = []
    if adapter.expires is not None:
        parts.append(f"in {_duration((adapter.expires - datetime.now(UTC)).total_seconds())}")
    if adapter.max_uses is not None:
        parts.append(f"{adapter.uses_left} of {adapter.max_uses} uses left")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    """In the largest unit of which there are two or more."""
    seconds = max(seconds, 0.0)
    size, unit = next(((size, unit) for size, unit in _UNITS if seconds >= 2 * size), _UNITS[-1])
    return f"{seconds / size:.0f} {unit}"
