"""Which units make which step. The order is a pure function of seed and step.

Nothing has to be saved to resume in the middle of an epoch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loramux_trainer.schema.optim_config import OptimConfig

_POOL = 16  # batches sorted by length together: little padding, still well mixed


class StepOrder:
    """The micro-batches of every step; each epoch sees each example once, in its own order."""

    def __init__(self, lengths: Sequence[int], *, batch_size: int, accumulation: int, seed: int) -> None:
        self._lengths, self._batch_size, self._accumulation, self._seed = lengths, batch_size, accumulation, seed
        micro_batches = -(-len(lengths) // batch_size)
        self.steps_per_epoch = -(-micro_batches // accumulation)
        self._epoch_order = lru_cache(maxsize=1)(self._order)

    @classmethod
    def of(cls, training: OptimConfig, lengths: Sequence[int]) -> StepOrder:
        """Of a job's units with so many tokens."""
        size, accumulation = training.batch_size, training.gradient_accumulation_steps
        return cls(lengths, batch_size=size, accumulation=accumulation, seed=training.seed)

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
