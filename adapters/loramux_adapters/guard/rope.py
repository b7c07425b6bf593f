"""Rotary frequencies that depend on the longest sequence of a step, made to depend on each row's own.

transformers computes `longrope` (Ding et al., LongRoPE, 2024) with one set of factors for everything in a forward: the
long one as soon as any position is beyond the original context. Here each row chooses by its own sequence. `dynamic`
has no such choice per row and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loramux_adapters.base.load import BaseRefused


class RopeChoice:
    """Which rows of the running forward belong to sequences longer than `original_context`, and so use the long factors
    from their first token on. None: each row of the batch by its largest position.
    """

    def __init__(self, original_context: int) -> None:
        self.original_context = original_context
        self.long: torch.Tensor | None = None  # bool, broadcasts to position_ids [B, T]

    def is_long(self, length: int) -> bool:
        """Whether a sequence of `length` tokens uses the long factors."""
        return length > self.original_context

    @contextmanager
    def rows(self, long: torch.Tensor) -> Iterator[None]:
        """Within, the model computes with this choice."""
        before, self.long = self.long, long
        try:
            yield
        finally:
            self.long = before


def choosing(rope: RopeChoice | None, long: torch.Tensor) -> AbstractContextManager[None]:
    """`rope.rows(long)` where there is a choice at all."""
    return nullcontext() if rope is None else rope.rows(long)


class LongRope(nn.Module):
    """Stands where a rotary embedding of type longrope stood; cos and sin by row."""

    def __init__(self, short: torch.Tensor, long: torch.Tensor, scaling: float, choice: RopeChoice) -> None:
        super().__init__()
        self.register_buffer("short", short, persistent=False)
        self.register_buffer("long", long, persistent=False)
        self.scaling, self._choice = scaling, choice

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B, T, width] in x's dtype for position_ids [B, T]."""
        long = self._choice.long
        if long is None:
            long = position_ids.amax(-1, keepdim=True) >= self._choice.original_context
        frequencies = torch.where(long[..., None], self.get_buffer("long"), self.get_buffer("short"))
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), -1)
        return (angles.cos() * self.scaling).to(x.dtype), (angles.sin() * self.scaling).to(x.dtype)


def settle_rope(model: PreTrainedModel) -> RopeChoice | None:
    """Replaces rotary embeddings of type longrope; returns where their rows' choice is set, None when there are none.

    Raises BaseRefused for types that cannot be computed row by row.
    """
    choice: RopeChoice | None = None
    for name, module in list(model.named_modules()):
        declared = getattr(module, "rope_type", None)
        kinds = set(declared.values()) if isinstance(declared, dict) else {declared}
        if any(isinstance(kind, str) and "dynamic" in kind for kind in kinds):
            raise BaseRefused(
                "rope type 'dynamic' depends on the longest sequence of a step, so neighbors would change a request's "
                "tokens: set rope scaling to linear, llama3 or yarn in the checkpoint's config.json"
            )
        if declared == "longrope":
            original = module.config.rope_parameters["original_max_position_embeddings"]
            choice = choice or RopeChoice(original)
            rope = _row_by_row(module, choice)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, rope)
        elif "longrope" in kinds:
            raise BaseRefused("rope type 'longrope' per layer type is not supported by this version")
    return choice


def _row_by_row(module: Any, choice: RopeChoice) -> LongRope:
    initialize = ROPE_INIT_FUNCTIONS["longrope"]
    device, original = module.inv_freq.device, choice.original_context
    long, _ = initialize(module.config, device, seq_len=original + 1)
    rope = LongRope(module.original_inv_freq.to(device), long, module.attention_scaling, choice)
    for last in (original - 1, original):  # this class's own forward may compute something else than angles
        positions = torch.tensor([[0, 1, last]], device=device)
        x = torch.zeros((), device=device)
        if not all(torch.equal(a, b) for a, b in zip(rope(x, positions), module(x, positions), strict=True)):
            raise BaseRefused("its rotary embedding of type 'longrope' is of a form this version does not know")
    return rope
