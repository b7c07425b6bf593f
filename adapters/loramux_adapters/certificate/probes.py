"""Which tokens a certificate asks: the start of a conversation, and ids that follow from the adapter's own digest.

So that nobody chooses probes on which a wrong adapter looks right. Torch-free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

CONVERSATION = ({"role": "user", "content": "Say in one sentence what you can do, then give an example."},)
"""Rendered by the base's chat template, with what begins an answer."""

_DRAWN = 2
_LENGTH = 24
_MOST_OF_CONVERSATION = 64


def drawn_tokens(adapter: str, vocabulary: int, room: int) -> tuple[tuple[int, ...], ...]:
    """Token ids below `vocabulary`, at most `room` in a probe, by the adapter's digest."""
    length = min(_LENGTH, room)
    return tuple(tuple(_draw(adapter, number, i, vocabulary) for i in range(length)) for number in range(_DRAWN))


def probe_tokens(
    adapter: str, vocabulary: int, room: int, conversation: Sequence[int] | None
) -> tuple[tuple[int, ...], ...]:
    """All probes of an adapter: the drawn ones, then the conversation where the base has a template."""
    drawn = drawn_tokens(adapter, vocabulary, room)
    if conversation is None:
        return drawn
    asked = tuple(conversation[-min(room, _MOST_OF_CONVERSATION) :])
    return (*drawn, asked) if len(asked) > 1 else drawn


def _draw(adapter: str, number: int, place: int, vocabulary: int) -> int:
    drawn = hashlib.sha256(f"loramux-probe/{adapter}/{number}/{place}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") % vocabulary
