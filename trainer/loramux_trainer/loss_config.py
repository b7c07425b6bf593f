"""The section of a job that names its loss. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loramux_adapters.validation import Section


@dataclass(frozen=True)
class LossConfig(Section):
    """The loss; a job may give its name alone."""

    name: Literal["sft", "dpo", "kto", "orpo"] = "sft"
