"""Log-probabilities of given tokens and of the likeliest others, as plain values.

Natural logarithms. Ties go to the lower id, so an answer does not depend on how many alternatives
a neighbor asked for. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loramux_server.requests import TokenLogprob

_ROWS_AT_ONCE = 64  # bounds the float32 copy of a long prompt's logits


def token_logprobs(logits: Tensor, tokens: Tensor, alternatives: Sequence[int]) -> list[TokenLogprob]:
    """Log-probability of `tokens` [rows] under `logits` [rows, vocab], each with its number of alternatives.

    Alternatives of probability zero are left out.
    """
    found: list[TokenLogprob] = []
    for begin in range(0, len(alternatives), _ROWS_AT_ONCE):
        part = slice(begin, begin + _ROWS_AT_ONCE)
        logprobs = logits[part].float().log_softmax(dim=1)
        chosen = logprobs.gather(1, tokens[part, None]).flatten().tolist()
        best = _best(logprobs, max(alternatives[part]))
        for token, logprob, top, number in zip(tokens[part].tolist(), chosen, best, alternatives[part], strict=True):
            found.append(TokenLogprob(token, logprob, tuple(top[:number])))
    return found


def _best(logprobs: Tensor, number: int) -> list[list[tuple[int, float]]]:
    """The `number` likeliest (id, log-probability) of each row, best first."""
    number = min(number, logprobs.shape[1])
    if number == 0:
        return [[] for _ in range(logprobs.shape[0])]
    values, ids = logprobs.topk(number, dim=1)
    last = values[:, -1:]
    # topk may take any of the tokens tied at its end; where it had a choice, take the lowest ids.
    had_choice = (logprobs == last).sum(dim=1) > (values == last).sum(dim=1)
    for row in had_choice.nonzero().flatten().tolist():
        above = int((values[row] > last[row]).sum())
        tied = (logprobs[row] == last[row]).nonzero().flatten()
        ids[row, above:] = tied[: number - above]
    pairs = (zip(i, v, strict=True) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return [
        sorted(((i, v) for i, v in row if v > float("-inf")), key=lambda pair: (-pair[1], pair[0])) for row in pairs
    ]


def finite_rows(logits: Tensor) -> Tensor:
    """Whether each row of [rows, vocab] can be a distribution, bool [rows]: no NaN, no +Inf, not all -Inf."""
    return torch.isfinite(logits.amax(dim=1))  # the maximum hands NaN on
