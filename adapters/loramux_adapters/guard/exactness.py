"""Whether a model computed in packed steps answers as it does untouched, one sequence at a time: the last word on every
base before it serves or trains.

A few sequences are cut into the steps that serving is made of: chunks of prompts, continued chunks, decodes, each
beside the others. Knows no cache: whoever computes the steps is handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from loramux_adapters.base.load import BaseRefused, LoadedBase
from loramux_adapters.guard.layers import AttentionLayer
from loramux_adapters.guard.products import own_products

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.02}
"""Largest relative error (norm of the difference over norm of the logits) of packed rows against the untouched model:
of each row in float32, of the median of a kind of rows in half precision. Measured on sound models: 1e-6 in float32; in
bfloat16 a median of 0.01 and single rows of 0.08. A wrong position, mask or state gives 0.1 and more."""

FAR_BYTES = 256 << 20
"""KV bytes that the check far into the context may take, twice."""

_SHORT, _LONG = 13, 100
_DECODES = 4
_FAR_TOKENS = 6


class Piece(NamedTuple):
    """Positions start .. stop - 1 of one sequence, computed in one step. `length` is the whole sequence's."""

    sequence: int
    start: int
    stop: int
    length: int


class PackedModel(Protocol):
    """Computes steps with KV of its own, as serving does."""

    def step(self, pieces: Sequence[tuple[Piece, torch.Tensor]]) -> list[torch.Tensor]:
        """Logits [n, vocab] of every row of each piece; pieces come with their token ids [n]."""
        ...

    def preload(self, sequence: int, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Sets what a sequence's first positions left in the cache: per layer [heads, n, width]."""
        ...


@dataclass(frozen=True, eq=False)
class Truth:
    """What the untouched model says of each sequence: logits [tokens, vocab] of its last rows.

    `preloaded` [layers][2] stands for the first positions of the last sequence, which are not computed.
    """

    ids: tuple[torch.Tensor, ...]
    logits: tuple[torch.Tensor, ...]
    preloaded: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    @property
    def far_start(self) -> int:
        """Positions of the last sequence that are preloaded; 0 when there is none."""
        return self.preloaded[0][0].shape[1] if self.preloaded else 0


@torch.inference_mode()
def ask_untouched(base: LoadedBase, layers: Sequence[AttentionLayer], context: int, room: int, block: int = 1) -> Truth:
    """Asks the model as transformers runs it, with its own masks and its own cache.

    To be called before anything is put into the model. `room` is the number of positions a cache can hold, each
    sequence in whole blocks of `block`.
    """
    with own_products(base.model, base.compute_dtype):
        return _ask(base, layers, context, room, block)


def _ask(base: LoadedBase, layers: Sequence[AttentionLayer], context: int, room: int, block: int) -> Truth:
    model, vocabulary = base.model, base.spec.vocab_size
    model.set_attn_implementation("eager")
    lengths, left = [], room // block * block
    for wanted in (_LONG, _SHORT):
        length = min(wanted, context, left)
        if length > 0:
            lengths.append(length)
            left -= -(-length // block) * block
    ids = [_some_ids(length, 13 + index, vocabulary, base.device) for index, length in enumerate(lengths)]
    logits = [model(input_ids=sequence[None], use_cache=False).logits[0].float() for sequence in ids]
    _refuse_non_finite(base, logits)
    start = min(context - _FAR_TOKENS, left - _FAR_TOKENS, _far_positions(layers, base.compute_dtype))
    if start <= _LONG or not (preloaded := _some_kv(model, layers, start, base)):
        return Truth(tuple(ids), tuple(logits))
    far = _some_ids(_FAR_TOKENS, 5, vocabulary, base.device)
    answer = model(
        input_ids=far[None],
        position_ids=torch.arange(start, start + _FAR_TOKENS, device=base.device)[None],
        past_key_values=_cache_of(preloaded),
        use_cache=True,
    )
    return Truth((*ids, far), (*logits, answer.logits[0].float()), preloaded)


@torch.inference_mode()
def check_exact(truth: Truth, packed: PackedModel, dtype: torch.dtype) -> float:
    """Compares every row of the packed steps with `truth`; returns the largest relative error, of medians in half
    precision.

    Raises BaseRefused beyond the tolerance of `dtype`. In half precision the median counts, of each kind of rows apart
    (prompts, decodes, far into the context): rounding moves single rows, a router sends near ties elsewhere.
    """
    far = len(truth.ids) - 1 if truth.preloaded else None
    if far is not None:
        packed.preload(far, [keys for keys, _ in truth.preloaded], [values for _, values in truth.preloaded])
    errors: dict[str, list[torch.Tensor]] = {}
    for pieces in _steps([len(ids) for ids in truth.ids], far, truth.far_start):
        found = packed.step([(piece, _part(truth, far, piece, truth.ids)) for piece in pieces])
        for piece, logits in zip(pieces, found, strict=True):
            expected = _part(truth, far, piece, truth.logits)
            error = (logits.float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-9)
            errors.setdefault(_kind(piece, far), []).append(error)
    reduce = torch.max if dtype == torch.float32 else torch.median
    worst = {kind: float(reduce(torch.cat(found))) for kind, found in errors.items()}
    for kind, value in worst.items():
        if not value <= TOLERANCE[dtype]:
            raise BaseRefused(
                f"packed beside other sequences, {kind} get other logits than alone (relative error {value:.2g})"
            )
    return max(worst.values())


def _kind(piece: Piece, far: int | None) -> str:
    if piece.sequence == far:
        return "tokens far into the context"
    return "decoded tokens" if piece.stop - piece.start == 1 else "prompts"


def _refuse_non_finite(base: LoadedBase, logits: Sequence[torch.Tensor]) -> None:
    if all(bool(torch.isfinite(rows).all()) for rows in logits):
        return
    named = (
        name
        for name, parameter in base.model.named_parameters()
        for held in (getattr(getattr(parameter, "quant_state", None), "absmax", parameter),)
        if held.is_floating_point() and not bool(torch.isfinite(held).all())
    )
    name = next(named, None)
    where = f": {name} holds NaN or infinite values" if name else ""
    raise BaseRefused(f"the untouched model's own logits are not finite{where}")


def _part(truth: Truth, far: int | None, piece: Piece, of: Sequence[torch.Tensor]) -> torch.Tensor:
    first = truth.far_start if piece.sequence == far else 0
    return of[piece.sequence][piece.start - first : piece.stop - first]


def _steps(lengths: Sequence[int], far: int | None, far_start: int) -> list[list[Piece]]:
    """Prompts in chunks of unequal length and then token by token, all sequences beside each other."""
    cuts: list[list[int]] = []
    for index, length in enumerate(lengths):
        if index == far:
            cuts.append([far_start, far_start + length - 2, far_start + length - 1, far_start + length])
            continue
        prompt = max(1, length - _DECODES)
        first = prompt * 3 // 5 if index == 0 else prompt
        cuts.append(sorted({0, max(1, first), prompt, *range(prompt, length + 1)}))
    steps = max(len(borders) for borders in cuts) - 1
    return [
        [
            Piece(index, borders[step], borders[step + 1], borders[-1])
            for index, borders in enumerate(cuts)
            if step + 1 < len(borders)
        ]
        for step in range(steps)
    ]


def _some_ids(length: int, seed: int, vocabulary: int, device: torch.device) -> torch.Tensor:
    return (torch.arange(length, device=device) * 7919 + seed) % vocabulary


def _far_positions(layers: Sequence[AttentionLayer], dtype: torch.dtype) -> int:
    size = sum(layer.heads * (layer.key_width + layer.value_width) for layer in layers) * dtype.itemsize
    return FAR_BYTES // size


def _some_kv(
    model: PreTrainedModel, layers: Sequence[AttentionLayer], positions: int, base: LoadedBase
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Keys and values [heads, positions, width] per layer as if of earlier tokens; empty where the model's own cache
    keeps something else than what attention is given.

    Values drift with the position, so that seeing too many or too few of them shows in the average.
    """
    cache = DynamicCache()
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=base.device), past_key_values=cache, use_cache=True)
        kept = [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers]
    except Exception:  # a cache of the model's own kind: the steps from the first token on will tell
        return ()
    given = [((1, n.heads, 2, n.key_width), (1, n.heads, 2, n.value_width)) for n in layers]
    if kept != given:
        return ()
    generator = torch.Generator().manual_seed(1)
    drift = torch.linspace(-3, 3, positions)[:, None]
    return tuple(
        (
            torch.randn(n.heads, positions, n.key_width, generator=generator).to(base.device, base.compute_dtype),
            (torch.randn(n.heads, positions, n.value_width, generator=generator) + drift).to(
                base.device, base.compute_dtype
            ),
        )
        for n in layers
    )


def _cache_of(preloaded: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for index, (keys, values) in enumerate(preloaded):
        cache.update(keys[None], values[None], index)
    return cache
