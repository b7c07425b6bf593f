"""Which examples make which step, and their padded tensors. The order is a pure function of seed and step.

Nothing has to be saved to resume in the middle of an epoch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from loramux_trainer.examples import IGNORE, Example

_POOL = 16  # batches sorted by length together: little padding, still well mixed


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded rows. `mask` is None when no row is padded."""

    ids: torch.Tensor  # [rows, length]
    labels: torch.Tensor  # [rows, length], IGNORE where there is no loss
    mask: torch.Tensor | None  # [rows, length], 1 for real tokens
    supervised: int  # predicted tokens that carry a loss

    @property
    def lengths(self) -> torch.Tensor:
        """Real tokens of each row [rows]."""
        if self.mask is None:
            return torch.full((self.ids.shape[0],), self.ids.shape[1], device=self.ids.device)
        return self.mask.sum(1)


class StepOrder:
    """The micro-batches of every step; each epoch sees each example once, in its own order."""

    def __init__(self, lengths: Sequence[int], *, batch_size: int, accumulation: int, seed: int) -> None:
        self._lengths, self._batch_size, self._accumulation, self._seed = lengths, batch_size, accumulation, seed
        micro_batches = -(-len(lengths) // batch_size)
        self.steps_per_epoch = -(-micro_batches // accumulation)
        self._epoch_order = lru_cache(maxsize=1)(self._order)

    def micro_batches(self, step: int) -> list[list[int]]:
        """Indices of the examples of 0-based `step`, one list per micro-batch."""
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self._accumulation
        return self._epoch_order(epoch)[start : start + self._accumulation]

    def _order(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"order/{self._seed}/{epoch}")
        indices = list(range(len(self._lengths)))
        rng.shuffle(indices)
        pool = _POOL * self._batch_size
        batches = []
        for start in range(0, len(indices), pool):
            part = sorted(indices[start : start + pool], key=lambda index: self._lengths[index])
            batches += [part[i : i + self._batch_size] for i in range(0, len(part), self._batch_size)]
        rng.shuffle(batches)
        return batches


def collate(examples: Sequence[Example], *, pad_id: int, device: torch.device) -> Batch:
    """Right-pad to the longest row."""
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad_id, dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORE, dtype=torch.long)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids[row, :size] = torch.tensor(example.ids)
        labels[row, :size] = torch.tensor(example.labels)
        mask[row, :size] = 1
    padded = bool((mask == 0).any())
    return Batch(
        ids.to(device),
        labels.to(device),
        mask.to(device) if padded else None,
        sum(example.supervised for example in examples),
    )
