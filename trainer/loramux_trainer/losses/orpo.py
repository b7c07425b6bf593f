"""Odds ratio preference optimization (Hong et al. 2024), as in trl: no reference, and the chosen row learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from loramux_trainer.data.examples import IGNORE, Example, Unit
from loramux_trainer.losses.log_probs import check_rows, log1mexp, numbers
from loramux_trainer.losses.protocol import Totals


@dataclass(frozen=True)
class OrpoLoss:
    """Token mean of the chosen rows, prompts included, less `beta` times the mean log-sigmoid of the log odds ratio."""

    beta: float = 0.1
    name = "orpo"
    needs_reference = False
    least_units = 1

    def rows(self, units: Sequence[Unit]) -> tuple[Example, ...]:
        """Chosen and rejected of each pair in turn; of the chosen one every token is wanted."""
        return tuple(row for unit in units for row in (_all_of(unit.rows[0]), unit.rows[1]))

    def totals(self, units: Sequence[Unit]) -> Totals:
        """Pairs, and tokens of the chosen rows."""
        return Totals(units=len(units), tokens=sum(_all_of(unit.rows[0]).supervised for unit in units))

    def value(
        self, policy: Sequence[Tensor], reference: Sequence[Tensor] | None, units: Sequence[Unit], totals: Totals
    ) -> tuple[Tensor, Mapping[str, float]]:
        """The chunk's tokens by those of the step, and its pairs by those of the step."""
        check_rows(policy, 2 * len(units))
        learned = torch.cat(list(policy[0::2]))
        answers = (_answer_of(row, unit.rows[0]) for row, unit in zip(policy[0::2], units, strict=True))
        chosen = torch.stack([answer.mean() for answer in answers])
        rejected = torch.stack([row.mean() for row in policy[1::2]])
        log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
        ratio = F.logsigmoid(log_odds)
        nll = -learned.sum() / totals.tokens
        metrics = {
            "rewards/chosen": self.beta * chosen.sum(),
            "rewards/rejected": self.beta * rejected.sum(),
            "rewards/margins": self.beta * (chosen - rejected).sum(),
            "rewards/accuracies": (chosen > rejected).sum(),
            "logps/chosen": chosen.sum(),
            "logps/rejected": rejected.sum(),
            "log_odds_ratio": ratio.sum(),
            "log_odds_chosen": log_odds.sum(),
        }
        shares = numbers({**{name: value / totals.units for name, value in metrics.items()}, "nll_loss": nll})
        return nll - self.beta * ratio.sum() / totals.units, shares


def _all_of(example: Example) -> Example:
    return Example(example.ids, example.ids)


def _answer_of(log_probs: Tensor, example: Example) -> Tensor:
    """Of the log-probabilities of every token of a row, those of its answer."""
    answer = torch.tensor([label != IGNORE for label in example.labels[1:]], device=log_probs.device)
    return log_probs[answer]
