"""Supervised fine-tuning: the mean over tokens of their negative log-likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loramux_trainer.data.examples import Example, Unit
from loramux_trainer.losses.log_probs import check_rows
from loramux_trainer.losses.protocol import Totals


@dataclass(frozen=True)
class SftLoss:
    """`nll`, or `dft`, which weighs each token by its own probability (Dynamic Fine-Tuning, arXiv 2508.05629)."""

    kind: Literal["nll", "dft"] = "nll"
    name = "sft"
    needs_reference = False
    least_units = 1

    def rows(self, units: Sequence[Unit]) -> tuple[Example, ...]:
        """All rows of all units."""
        return tuple(row for unit in units for row in unit.rows)

    def totals(self, units: Sequence[Unit]) -> Totals:
        """Units and supervised tokens."""
        return Totals(units=len(units), tokens=sum(unit.supervised for unit in units))

    def value(
        self, policy: Sequence[Tensor], reference: Sequence[Tensor] | None, units: Sequence[Unit], totals: Totals
    ) -> tuple[Tensor, Mapping[str, float]]:
        """The sum over the chunk's tokens by the tokens of the step; no metrics."""
        check_rows(policy, sum(len(unit.rows) for unit in units))
        log_probs = torch.cat(list(policy))
        terms = log_probs * log_probs.detach().exp() if self.kind == "dft" else log_probs
        return -terms.sum() / totals.tokens, {}
