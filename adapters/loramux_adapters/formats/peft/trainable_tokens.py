"""Trainable tokens alone: the rows of some tokens in the embedding, and in a head that is tied to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import ConfigKeys, PeftConfig
from loramux_adapters.formats.peft.extras import token_ids_of, token_rows_target
from loramux_adapters.formats.peft.module_tuner import ModuleTuner
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.spec import BaseModelSpec, ModuleSpec

_SUFFIX = ".trainable_tokens_delta"


@dataclass(frozen=True)
class TrainableTokensTuner(ModuleTuner):
    """See the module."""

    peft_type = "TRAINABLE_TOKENS"
    kind = "trainable tokens"
    marker = ".trainable_tokens_"
    keys = ConfigKeys(
        applied=frozenset({"target_modules", "token_indices"}),
        ignorable=frozenset({"init_weights"}),
        extras=frozenset(),
    )
    endings: ClassVar = {"token_rows": _SUFFIX}
    adaptable = ("embedding", "linear")

    ids: tuple[int, ...]

    @property
    def token_ids(self) -> Iterable[int]:
        """See ExtraTargets."""
        return self.ids

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        return {"ids": config.ids("token_indices")}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        names = dict.fromkeys(modules, False)
        if base.tied_embeddings and base.embedding in modules and base.head is not None:
            names[base.head] = True  # PEFT writes the tied head's as well
        return Targets(
            {name: token_rows_target(name, self.ids, base, _SUFFIX, is_copy=copy) for name, copy in names.items()}
        )

    def arithmetic(self, targets: Targets) -> dict[str, Any]:
        """See Tuner."""
        return {"kind": self.kind} | token_ids_of(targets.modules)
