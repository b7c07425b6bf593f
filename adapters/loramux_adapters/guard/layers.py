"""What attention looks like to a model's layers: the shapes of keys and values, and how far back a row sees."""

from __future__ import annotations

from typing import NamedTuple


class AttentionLayer(NamedTuple):
    """KV heads and head width of one attention layer, for keys and values (some models differ).

    A row at position p sees positions p - window + 1 .. p, all before where `window` is None.
    """

    heads: int
    key_width: int
    value_width: int
    window: int | None = None
