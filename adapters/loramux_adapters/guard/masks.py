"""Reads what a model's own attention mask lets a row see, at any position, without a forward of that length.

transformers builds masks from index functions (masking_utils). A server that keeps its own KV cache is given no mask,
so what only the mask carries (sliding windows, chunks) must be learned from these functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

MaskFunction = Callable[..., torch.Tensor]
"""(batch, head, query position, key position) -> whether the key is visible; index tensors broadcast."""

_SOME_ROWS = 16


@dataclass(frozen=True)
class MaskRefused(ValueError):
    """A mask that is neither causal nor a sliding window; plain up to `exact_context` positions."""

    exact_context: int

    def __str__(self) -> str:
        return f"neither causal nor a sliding window beyond {self.exact_context} positions"


def read_window(mask: MaskFunction, context: int) -> int | None:
    """The sliding window of a causal mask over `context` positions, None where a row sees everything before it.

    Raises MaskRefused for any other pattern.
    """
    last = _visible(mask, context - 1, context)
    window = int(last.sum())
    if not _is_window(mask, window, context):
        raise MaskRefused(_causal_until(mask, context))
    return None if window == context else window


def _visible(mask: MaskFunction, query: int, context: int) -> torch.Tensor:
    """[context] bool: what the row at position `query` sees."""
    keys = torch.arange(context)
    zero = torch.zeros((), dtype=torch.long)
    visible = mask(zero, zero, torch.tensor(query), keys)
    return torch.as_tensor(visible, dtype=torch.bool).expand(context)


def _is_window(mask: MaskFunction, window: int, context: int) -> bool:
    """Whether rows at the borders of the window and at places all over the context see just their window."""
    borders = {0, 1, window - 1, window, window + 1, 2 * window, context - 2, context - 1}
    spread = {context * part // _SOME_ROWS for part in range(_SOME_ROWS)}
    keys = torch.arange(context)
    for query in sorted(borders | spread):
        if 0 <= query < context:
            expected = (keys <= query) & (keys > query - window)
            if not torch.equal(_visible(mask, query, context), expected):
                return False
    return True


def _causal_until(mask: MaskFunction, context: int) -> int:
    """The largest number of positions over which every row sees all before it and nothing after."""
    zero = torch.zeros((), dtype=torch.long)
    queries = torch.arange(context)
    sees_first = torch.as_tensor(mask(zero, zero, queries, zero), dtype=torch.bool).expand(context)
    blind = (~sees_first).nonzero()
    exact = int(blind[0]) if len(blind) else context
    return exact if exact and _is_window(mask, exact, exact) else 0
