"""One forward of a laid out step: the one place that knows how the model is called."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from loramux_adapters.guard.rope import RopeChoice, choosing
from loramux_server.model.forward_batch import ForwardBatch


def forward(model: PreTrainedModel, batch: ForwardBatch, rope: RopeChoice | None) -> torch.Tensor:
    """Logits [n, vocab] of the batch's logit rows; `rope` is where rows choose their factors, on LongRoPE bases."""
    with choosing(rope, batch.long_rope):
        output = model(
            input_ids=batch.ids[None],
            position_ids=batch.positions[None],
            attention_mask=None,
            use_cache=False,
            logits_to_keep=batch.logit_rows,
            ctx=batch.context,
        )
    logits: torch.Tensor = output.logits[0]
    return logits
