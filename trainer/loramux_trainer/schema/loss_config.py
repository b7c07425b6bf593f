"""The `loss` of a job: its name and its options, under the names and with the defaults that trl gives them.

An option that the loss, or its loss_type, does not read is refused: it would not take effect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from loramux_adapters.validation import Number, Section, Text, Whole, YesNo
from loramux_trainer.schema.fields import Count, Positive

LossName = Literal["sft", "dpo", "kto", "orpo", "grpo", "reward"]

LOSS_TYPES: Final[Mapping[str, tuple[str, ...]]] = {
    "sft": ("nll", "dft"),
    "dpo": (
        "sigmoid",
        "sigmoid_norm",
        "hinge",
        "ipo",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
    ),
    "kto": ("kto", "apo_zero_unpaired"),
    "orpo": (),
    "grpo": ("dapo", "grpo", "bnpo", "dr_grpo"),
    "reward": (),
}
"""Loss -> its loss types; the first one is the default."""

_WHY_NOT: Final[Mapping[str, str]] = {
    "aot": "it sorts the pairs of a whole batch, and a step is computed in chunks",
    "aot_unpaired": "it sorts the answers of a whole batch, and a step is computed in chunks",
    "sft": "it is a loss of its own: loss: sft",
    "chunked_nll": "it is nll, whose logits are always computed in chunks",
}
# Option -> the losses that read it.
_READ_BY: Final[Mapping[str, tuple[str, ...]]] = {
    "loss_type": ("sft", "dpo", "kto", "grpo"),
    "beta": ("dpo", "kto", "orpo", "grpo"),
    "label_smoothing": ("dpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "precompute_ref_log_probs": ("dpo", "kto"),
    **dict.fromkeys(("reward_function", "num_generations", "max_completion_length", "temperature"), ("grpo",)),
}
_SMOOTHED: Final = ("robust", "exo_pair")
_ENTRY_POINT: Final = re.compile(r"[^:]+:[A-Za-z_]\w*")


@dataclass(frozen=True)
class LossConfig(Section):
    """What is minimized. None is trl's default for the loss: beta 0.1 (of grpo 0), weights 1, the first of LOSS_TYPES,
    8 answers to a prompt of at most 256 tokens at temperature 1.

    `reward_function` is `module:function`: what scores the answers of grpo, called as trl calls it.
    """

    name: LossName = "sft"
    loss_type: Text | None = None
    beta: Annotated[Number, Field(gt=0)] | None = None
    label_smoothing: Annotated[Annotated[Number, Field(gt=0, lt=0.5)] | None, Field(validate_default=True)] = None
    desirable_weight: Annotated[Number, Field(ge=0)] | None = None
    undesirable_weight: Annotated[Number, Field(ge=0)] | None = None
    precompute_ref_log_probs: YesNo = False
    reward_function: Annotated[Text | None, Field(validate_default=True)] = None
    num_generations: Annotated[Whole, Field(ge=2)] | None = None
    max_completion_length: Count | None = None  # tokens
    temperature: Positive | None = None

    @field_validator("loss_type")
    @classmethod
    def _is_of_the_loss(cls, kind: str | None, others: ValidationInfo) -> str | None:
        name = others.data.get("name")
        if name is None or kind is None or not LOSS_TYPES[name]:
            return kind
        if kind not in LOSS_TYPES[name]:
            known = ", ".join(LOSS_TYPES[name])
            why = f"{kind} is not computed here, as {_WHY_NOT[kind]}" if kind in _WHY_NOT else f"not {kind!r}"
            raise ValueError(f"of {name} must be one of {known}; {why}")
        return kind

    @field_validator("*")
    @classmethod
    def _takes_effect(cls, value: Any, others: ValidationInfo) -> Any:
        """Each option is read by the loss and the loss type that are asked for."""
        option, name = others.field_name or "", others.data.get("name")
        if name is None or value is None or value is False or option not in _READ_BY:
            return value
        if name not in _READ_BY[option]:
            raise ValueError(f"is not read by loss {name}, but by {', '.join(_READ_BY[option])}: leave it out")
        if option == "precompute_ref_log_probs" and name == "kto" and others.data.get("loss_type") in (None, "kto"):
            raise ValueError(
                "cannot be true with loss_type kto: prompts meet other answers in each epoch, so the reference is "
                "computed in the same pass"
            )
        if option == "label_smoothing" and others.data.get("loss_type") not in _SMOOTHED:
            raise ValueError(f"takes effect with loss_type {' or '.join(_SMOOTHED)} only: leave it out")
        return value

    @field_validator("label_smoothing")
    @classmethod
    def _is_there_for_exo(cls, value: float | None, others: ValidationInfo) -> float | None:
        if value is None and others.data.get("loss_type") == "exo_pair":
            raise ValueError("is required with loss_type exo_pair: 1.0e-3 is what its paper recommends")
        return value

    @field_validator("reward_function")
    @classmethod
    def _names_a_function(cls, value: str | None, others: ValidationInfo) -> str | None:
        if value is None and others.data.get("name") == "grpo":
            raise ValueError("is required with loss grpo: module:function, which scores what the adapter writes")
        if value is not None and not _ENTRY_POINT.fullmatch(value):
            raise ValueError(f"must be module:function, not {value!r}")
        return value

    @property
    def kind(self) -> str:
        """The loss type in effect; empty for a loss that has none."""
        return self.loss_type or next(iter(LOSS_TYPES[self.name]), "")

    @property
    def strength(self) -> float:
        """The beta in effect."""
        return 0.1 if self.beta is None else self.beta

    @property
    def generations(self) -> int:
        """Answers that grpo samples to each prompt."""
        return self.num_generations or 8

    @property
    def longest_completion(self) -> int:
        """Tokens of an answer that grpo samples, at most."""
        return self.max_completion_length or 256


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


LossChoice = Annotated[LossConfig, BeforeValidator(_named)]
"""The job's key: a name, or a mapping with `name` and options."""

SFT: Final = LossConfig()
"""Without a `loss` in the job."""
