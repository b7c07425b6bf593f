"""Direct preference optimization (Rafailov et al. 2023) and its relatives of one pair at a time, as in trl."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from loramux_trainer.data.examples import Example, Unit
from loramux_trainer.losses.log_probs import answer_sums, numbers
from loramux_trainer.losses.protocol import Totals


@dataclass(frozen=True)
class _Ratios:
    """Log-ratios of policy over reference [pairs], how many tokens the answers have [pairs], and the options."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    beta: float
    smoothing: float

    @property
    def scaled(self) -> Tensor:
        """The difference of the implicit rewards."""
        return self.beta * (self.chosen - self.rejected)

    @property
    def per_token(self) -> Tensor:
        """The difference of the mean log-ratios of a token."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens


def _sigmoid(r: _Ratios) -> Tensor:
    return -F.logsigmoid(r.scaled)


def _sigmoid_norm(r: _Ratios) -> Tensor:
    return -F.logsigmoid(r.beta * r.per_token)


def _hinge(r: _Ratios) -> Tensor:
    return torch.relu(1 - r.scaled)


def _ipo(r: _Ratios) -> Tensor:
    """Azar et al. 2023, equation 17; by tokens, as trl's authors agreed with theirs."""
    return (r.per_token - 1 / (2 * r.beta)) ** 2


def _exo_pair(r: _Ratios) -> Tensor:
    """Ji et al. 2024, equation 16, for two answers."""
    epsilon = torch.tensor(r.smoothing, device=r.chosen.device)
    won = torch.sigmoid(r.scaled) * (F.logsigmoid(r.scaled) - torch.log1p(-epsilon))
    return won + torch.sigmoid(-r.scaled) * (F.logsigmoid(-r.scaled) - torch.log(epsilon))


def _nca_pair(r: _Ratios) -> Tensor:
    chosen, rejected = r.beta * r.chosen, r.beta * r.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _robust(r: _Ratios) -> Tensor:
    """Chowdhury et al. 2024: labels are flipped with the probability `label_smoothing`."""
    clean = -(1 - r.smoothing) * F.logsigmoid(r.scaled)
    return (clean + r.smoothing * F.logsigmoid(-r.scaled)) / (1 - 2 * r.smoothing)


def _bco_pair(r: _Ratios) -> Tensor:
    return -F.logsigmoid(r.beta * r.chosen) - F.logsigmoid(-r.beta * r.rejected)


def _sppo_hard(r: _Ratios) -> Tensor:
    return (r.chosen - 0.5 / r.beta) ** 2 + (r.rejected + 0.5 / r.beta) ** 2


def _apo_zero(r: _Ratios) -> Tensor:
    return 1 - torch.sigmoid(r.beta * r.chosen) + torch.sigmoid(r.beta * r.rejected)


def _apo_down(r: _Ratios) -> Tensor:
    return torch.sigmoid(r.beta * r.chosen) + 1 - torch.sigmoid(r.scaled)


DPO_TYPES: Final[Mapping[str, Callable[[_Ratios], Tensor]]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}
"""loss_type -> the loss of each pair [pairs]."""


@dataclass(frozen=True)
class DpoLoss:
    """The mean over pairs. The reference is the frozen base."""

    beta: float = 0.1
    kind: str = "sigmoid"
    label_smoothing: float = 0.0
    name = "dpo"
    needs_reference = True
    least_units = 1

    def rows(self, units: Sequence[Unit]) -> tuple[Example, ...]:
        """Chosen and rejected of each pair in turn."""
        return tuple(row for unit in units for row in unit.rows)

    def totals(self, units: Sequence[Unit]) -> Totals:
        """Pairs."""
        return Totals(units=len(units))

    def value(
        self, policy: Sequence[Tensor], reference: Sequence[Tensor] | None, units: Sequence[Unit], totals: Totals
    ) -> tuple[Tensor, Mapping[str, float]]:
        """The sum over the chunk's pairs by the pairs of the step; rewards are beta times the log-ratios."""
        if reference is None:
            raise ValueError("dpo needs the log-probabilities of the frozen base")
        log_probs = answer_sums(policy, 2 * len(units))
        log_ratios = log_probs - answer_sums(reference, 2 * len(units))
        lengths = torch.tensor([max(len(row), 1) for row in policy], device=log_ratios.device)
        ratios = _Ratios(
            log_ratios[0::2], log_ratios[1::2], lengths[0::2], lengths[1::2], self.beta, self.label_smoothing
        )
        chosen, rejected = self.beta * ratios.chosen, self.beta * ratios.rejected
        metrics = {
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/margins": (chosen - rejected).sum(),
            "rewards/accuracies": (chosen > rejected).sum(),
            "logps/chosen": log_probs[0::2].sum(),
            "logps/rejected": log_probs[1::2].sum(),
        }
        shares = numbers({name: value / totals.units for name, value in metrics.items()})
        return DPO_TYPES[self.kind](ratios).sum() / totals.units, shares
