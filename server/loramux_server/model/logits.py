"""What changes a request's logits before anything is drawn: penalties, bias, forbidden tokens.

Works on a copy of float32 rows; no row is read for another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loramux_server.engine.plan import Chunk
from loramux_server.model.sampling_state import Addends, TokenCounts
from loramux_server.requests import SamplingParams


def output_length(chunk: Chunk) -> int:
    """Tokens the request has given so far, the chunk's own included."""
    return chunk.start + len(chunk.tokens) - chunk.prompt_length


def is_suppressing(chunk: Chunk) -> bool:
    """Whether tokens are forbidden because the output is shorter than min_tokens."""
    return bool(chunk.params.suppressed) and output_length(chunk) < chunk.params.min_tokens


def is_adjusted(chunk: Chunk) -> bool:
    """Whether the model's logits are not taken as they are."""
    return chunk.params.needs_history or bool(chunk.params.logit_bias) or is_suppressing(chunk)


def adjust(logits: Tensor, chunks: Sequence[Chunk], counts: TokenCounts, addends: Addends) -> Tensor:
    """`logits` [chunks, vocab] float32 with each chunk's adjustments, as a new tensor.

    Repetition works on the model's own logits (Keskar et al., arXiv:1909.05858, as Hugging Face does it),
    then come frequency and presence (as OpenAI's API defines them), bias, and last what is forbidden.
    """
    logits = logits.clone()
    _repetition(logits, chunks, counts)
    _frequency_and_presence(logits, chunks, counts)
    for row, chunk in enumerate(chunks):
        if chunk.params.logit_bias:
            ids, values = addends.bias(chunk, logits.shape[1])
            logits[row].index_add_(0, ids, values)
        if is_suppressing(chunk):
            logits[row].index_fill_(0, addends.suppressed(chunk, logits.shape[1]), float("-inf"))
    return logits


def _repetition(logits: Tensor, chunks: Sequence[Chunk], counts: TokenCounts) -> None:
    rows = _where(chunks, lambda p: p.repetition_penalty != 1.0)
    if not rows:
        return
    index = torch.tensor(rows, device=logits.device)
    penalty = torch.tensor([[chunks[row].params.repetition_penalty] for row in rows], device=logits.device)
    scores = logits.index_select(0, index)
    punished = torch.where(scores < 0, scores * penalty, scores / penalty)
    seen = counts.seen([chunks[row].request_id for row in rows], logits.shape[1])
    logits.index_copy_(0, index, torch.where(seen, punished, scores))


def _frequency_and_presence(logits: Tensor, chunks: Sequence[Chunk], counts: TokenCounts) -> None:
    rows = _where(chunks, lambda p: p.presence_penalty != 0.0 or p.frequency_penalty != 0.0)
    if not rows:
        return
    index = torch.tensor(rows, device=logits.device)
    params = [chunks[row].params for row in rows]
    frequency = torch.tensor([[p.frequency_penalty] for p in params], device=logits.device)
    presence = torch.tensor([[p.presence_penalty] for p in params], device=logits.device)
    output = counts.output([chunks[row].request_id for row in rows], logits.shape[1])
    scores = logits.index_select(0, index)
    scores -= output * frequency + (output > 0) * presence
    logits.index_copy_(0, index, scores)


def _where(chunks: Sequence[Chunk], wanted: Callable[[SamplingParams], bool]) -> list[int]:
    return [row for row, chunk in enumerate(chunks) if wanted(chunk.params)]
