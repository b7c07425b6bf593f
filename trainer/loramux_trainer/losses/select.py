"""Which loss a job's `loss` is. A new loss is one file, one entry here and its options in loss_config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from loramux_trainer.errors import JobInvalid
from loramux_trainer.losses.dpo import DpoLoss
from loramux_trainer.losses.kto import KtoLoss
from loramux_trainer.losses.orpo import OrpoLoss
from loramux_trainer.losses.protocol import Loss
from loramux_trainer.losses.sft import SftLoss
from loramux_trainer.schema.loss_config import LossConfig


def _sft(config: LossConfig, max_length: int) -> Loss:
    kind: Any = config.kind
    return SftLoss(kind)


def _dpo(config: LossConfig, max_length: int) -> Loss:
    return DpoLoss(config.strength, config.kind, config.label_smoothing or 0.0)


def _kto(config: LossConfig, max_length: int) -> Loss:
    kind: Any = config.kind
    weights = (1.0 if weight is None else weight for weight in (config.desirable_weight, config.undesirable_weight))
    return KtoLoss(max_length, config.strength, kind, *weights)


def _orpo(config: LossConfig, max_length: int) -> Loss:
    return OrpoLoss(config.strength)


_LOSSES: Final[Mapping[str, Callable[[LossConfig, int], Loss]]] = {
    "sft": _sft,
    "dpo": _dpo,
    "kto": _kto,
    "orpo": _orpo,
}


def build_loss(config: LossConfig, *, max_length: int) -> Loss:
    """The loss that `config` asks for; no row of it is longer than `max_length` where no row of the data is."""
    return _LOSSES[config.name](config, max_length)


def check_batch_size(loss: Loss, batch_size: int) -> None:
    """Raises JobInvalid where a batch has fewer units than the loss needs."""
    if batch_size < loss.least_units:
        raise JobInvalid(
            "training.batch_size",
            f"{loss.name} needs at least {loss.least_units} in a batch: it estimates the divergence from the base on "
            "prompts with other prompts' answers",
            remedy=f"set training.batch_size to {loss.least_units} or more",
        )
