"""Drawing one token per row from the filtered distribution, without sorting the vocabulary.

Probabilities become integers first: integer sums are exact in any order, so a row gives the same
token alone and among batch mates, on every device. Knows distributions, not requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from loramux_server.model.row_selection import put_rows, take_rows

SCALE: Final = 2**40
"""Weight of a row's likeliest token; tokens 2^40 times less likely are never drawn."""

MIN_TEMPERATURE: Final = 1e-6
"""Below it float32 logits cannot be told from greedy."""

_SMALLEST_TOP_K_GROUP: Final = 64


@dataclass(frozen=True)
class Filters:
    """What one row's draw obeys; the neutral values are those of `SamplingParams`."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


def filtered_weights(logits: Tensor, best: Tensor, filters: Sequence[Filters]) -> tuple[Tensor, Tensor]:
    """Weights after temperature, top_k and min_p, and the mass of each row's nucleus (top_p).

    `logits` [rows, vocab] float32 and `best` [rows] their maximum -> int64 [rows, vocab], int64 [rows].
    The order is Hugging Face's: top_p counts what top_k left, min_p comes last. Ties at a border stay in
    together, so the set does not depend on a sort's whim. A row whose `best` is not finite gets no weight.
    """
    column = torch.tensor([[max(f.temperature, MIN_TEMPERATURE)] for f in filters], device=logits.device)
    # Subtract before dividing: a tiny temperature must not overflow. NaN marks rows that failed already.
    shares = ((logits - best[:, None]) / column).exp_().nan_to_num_(nan=0.0)
    weights = shares.mul_(SCALE).to(torch.int64)  # exact: float32 has 24 bits
    _mask_top_k(weights, logits, [f.top_k for f in filters])
    nucleus = _nucleus_mass(weights, filters)
    if any(f.min_p > 0.0 for f in filters):
        floor = torch.tensor([[round(f.min_p * SCALE)] for f in filters], device=logits.device)
        weights.mul_(weights >= floor)
    return weights, nucleus


def _mask_top_k(weights: Tensor, logits: Tensor, top_k: Sequence[int]) -> None:
    """Zero what is below the k-th logit, in place; rows of similar k share one selection."""
    vocabulary = logits.shape[1]
    groups: dict[int, list[int]] = {}
    for row, k in enumerate(top_k):
        if 0 < k < vocabulary:
            size = _SMALLEST_TOP_K_GROUP
            while size < k:
                size *= 4
            groups.setdefault(min(size, vocabulary), []).append(row)
    for rows in groups.values():
        kth = torch.tensor([[top_k[row] - 1] for row in rows], device=logits.device)
        chosen = take_rows(logits, rows)
        leaders = chosen.topk(max(top_k[row] for row in rows), dim=1).values
        put_rows(weights, rows, take_rows(weights, rows) * (chosen >= leaders.gather(1, kth)))


def _nucleus_mass(weights: Tensor, filters: Sequence[Filters]) -> Tensor:
    """[rows]: a token is in the nucleus iff the mass of strictly likelier ones is below this."""
    if all(f.top_p >= 1.0 for f in filters):
        return torch.full((len(filters),), torch.iinfo(torch.int64).max, device=weights.device)
    share = torch.tensor([f.top_p for f in filters], dtype=torch.float64, device=weights.device)
    mass = (share * weights.sum(dim=1)).ceil().to(torch.int64)
    # At least 1: the likeliest token has nothing above it and is always in.
    return torch.where(share >= 1.0, torch.iinfo(torch.int64).max, mass.clamp(min=1))


def draw(
    logits: Tensor, best: Tensor, filters: Sequence[Filters], uniforms: Callable[[Sequence[int], int], list[float]]
) -> Tensor:
    """One token id per row, int64 [rows]. `uniforms(rows, round)` gives a number in [0, 1) for each row.

    Inverse of the cumulated weights in id order. The nucleus is met by rejection: a token outside it is
    thrown away together with all that are not likelier, and the row draws again. What is accepted has
    exactly the nucleus's distribution; the expected number of rounds is at most logarithmic in the
    vocabulary and near 1 / top_p, and each is far below the price of a sort.
    """
    weights, nucleus = filtered_weights(logits, best, filters)
    tokens = torch.zeros(len(filters), dtype=torch.int64, device=logits.device)
    rows = list(range(len(filters)))
    for draw_round in range(logits.shape[1] + 1):  # each round removes a token, so it ends before
        picked = _inverse_cdf(weights, uniforms(rows, draw_round))
        put_rows(tokens, rows, picked)
        restricted = [i for i, row in enumerate(rows) if filters[row].top_p < 1.0]
        if not restricted:
            break
        if len(restricted) < len(rows):
            weights, nucleus, picked = (take_rows(t, restricted) for t in (weights, nucleus, picked))
            rows = [rows[i] for i in restricted]
        level = weights.gather(1, picked[:, None])
        likelier = weights * (weights > level)
        rejected = (likelier.sum(dim=1) >= nucleus).nonzero().flatten().tolist()
        if not rejected:
            break
        weights, nucleus = take_rows(likelier, rejected), take_rows(nucleus, rejected)
        rows = [rows[i] for i in rejected]
    return tokens


def _inverse_cdf(weights: Tensor, uniforms: list[float]) -> Tensor:
    """The first id [rows] whose cumulated weight exceeds the row's share of the total."""
    cumulated = weights.cumsum(dim=1)
    total = cumulated[:, -1]
    share = torch.tensor(uniforms, dtype=torch.float64, device=weights.device)
    # The product may round up to the total itself; a failed row has total 0 and may give any id.
    target = torch.minimum((share * total).to(torch.int64), total - 1)
    found = torch.searchsorted(cumulated, target[:, None], right=True).flatten()
    return found.clamp(max=weights.shape[1] - 1)
