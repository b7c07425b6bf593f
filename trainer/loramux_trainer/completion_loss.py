"""The loss of completions as a pure function of a model and a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from loramux_adapters.guard.rope import RopeChoice, choosing
from loramux_trainer.batches import Batch
from loramux_trainer.examples import IGNORE


def completion_loss(model: nn.Module, batch: Batch, rope: RopeChoice | None = None) -> torch.Tensor:
    """Sum over the supervised tokens of -log p(token | before), in float32; a scalar with gradient.

    A sum, because the caller divides by the tokens of the whole step: the mean then does not depend on how a
    step is cut into micro-batches. Logits are computed only at positions where some row has a loss. `rope`: on a base
    of type longrope each row computes by its own length, as it will be served, not by the longest of the batch.
    """
    positions = (batch.labels[:, 1:] != IGNORE).any(dim=0).nonzero().squeeze(1)
    long = batch.lengths[:, None] > (0 if rope is None else rope.original_context)
    with choosing(rope, long):
        logits = model(
            input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=positions
        ).logits  # [rows, positions, vocabulary]
    targets = batch.labels[:, positions + 1]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
