"""Kahneman-Tversky optimization (Ethayarajh et al. 2024): answers that are each desirable or not, as in trl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Literal

import torch
from torch import Tensor

from loramux_trainer.data.examples import IGNORE, Example, Unit
from loramux_trainer.losses.log_probs import answer_sums, numbers
from loramux_trainer.losses.protocol import Totals


@dataclass(frozen=True)
class KtoLoss:
    """The mean over answers. `kto` measures them against the divergence from the base, estimated on a chunk's prompts
    with each the answer of the unit before it; `apo_zero_unpaired` (D'Oosterlinck et al. 2024) against nothing.
    """

    max_length: int  # tokens of a row; a prompt with another's answer is cut there
    beta: float = 0.1
    kind: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    name = "kto"
    needs_reference = True

    @property
    def least_units(self) -> int:
        """With one unit, its prompt would meet its own answer, whose reward the divergence would take away."""
        return 2 if self.kind == "kto" else 1

    def rows(self, units: Sequence[Unit]) -> tuple[Example, ...]:
        """The answers of all units; for `kto`, then as many mismatched rows, of which no gradient is needed."""
        answers = tuple(unit.rows[0] for unit in units)
        if self.kind != "kto":
            return answers
        others = (answers[-1], *answers[:-1])
        return (*answers, *map(self._mismatched, answers, others))

    def totals(self, units: Sequence[Unit]) -> Totals:
        """Answers, and how many are desirable."""
        return Totals(units=len(units), desirable=sum(unit.label is True for unit in units))

    def value(
        self, policy: Sequence[Tensor], reference: Sequence[Tensor] | None, units: Sequence[Unit], totals: Totals
    ) -> tuple[Tensor, Mapping[str, float]]:
        """The weighted sum over the chunk's answers by the answers of the step."""
        if reference is None:
            raise ValueError("kto needs the log-probabilities of the frozen base")
        count = len(units)
        rows = 2 * count if self.kind == "kto" else count
        log_probs = answer_sums(policy, rows)
        log_ratios = log_probs - answer_sums(reference, rows)
        answers, divergence = log_ratios[:count], log_ratios.new_zeros(())
        if self.kind == "kto":
            divergence = log_ratios[count:].detach().mean().clamp(min=0)
        desirable = torch.tensor([unit.label is True for unit in units], device=answers.device)
        sign = torch.where(desirable, 1.0, -1.0)
        weight = torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        terms = weight * (1 - torch.sigmoid(self.beta * sign * (answers - divergence)))
        metrics: dict[str, Tensor] = {"kl": divergence * count / totals.units} if self.kind == "kto" else {}
        rewards = self.beta * answers
        counts = (("chosen", desirable, totals.desirable), ("rejected", ~desirable, totals.units - totals.desirable))
        for side, mask, of_step in counts:
            if of_step:
                metrics[f"rewards/{side}"] = rewards[mask].sum() / of_step
                metrics[f"logps/{side}"] = log_probs[:count][mask].sum() / of_step
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return terms.sum() / totals.units, numbers(metrics)

    def _mismatched(self, asked: Example, answered: Example) -> Example:
        """The prompt of one row with the answer of another."""
        begin = _answer_start(asked)
        answer = _answer_start(answered)
        row = Example((*asked.ids[:begin], *answered.ids[answer:]), (*asked.labels[:begin], *answered.labels[answer:]))
        return row.truncated(self.max_length)


def _answer_start(example: Example) -> int:
    """Where the first token with a loss is."""
    return len(example.labels) - sum(1 for _ in dropwhile(lambda label: label == IGNORE, example.labels))
