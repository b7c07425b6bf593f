"""Prompt tuning, P-tuning and multitask prompts: trained embeddings before the prompt, all saved alike.

Lester et al., 2021; Liu et al., 2021; Wang et al., 2023. Whatever network made them while training, the file holds what
it gave.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.config import ConfigKeys, PeftConfig, bad_key
from loramux_adapters.formats.peft.extras import NO_EXTRAS, Extras
from loramux_adapters.formats.peft.module_tuner import check_rank
from loramux_adapters.formats.peft.tuner import Shape, Target, Targets, Tuner
from loramux_adapters.parts.part import Part
from loramux_adapters.parts.virtual_tokens import VirtualTokens
from loramux_adapters.spec import BaseModelSpec, ModuleKind

_SIZES = {"num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim"}
SIZE_KEYS = frozenset(_SIZES)
"""What every method with virtual tokens says of the base and itself."""

EMBEDDINGS = "prompt_embeddings"


@dataclass(frozen=True)
class PromptTarget(Target):
    """The input embedding."""

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """It has no tensors of its own."""
        return {}

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """Multitask prompts are scaled by a product of two vectors of the task."""
        rows = tensors["rows"].float()
        if "task_rows" in tensors:
            rows = rows * (tensors["task_columns"].float()[0] @ tensors["task_rows"].float()[0])
        return (VirtualTokens(rows),)


@dataclass(frozen=True)
class PromptTuner(Tuner):
    """See the module."""

    peft_type = "PROMPT_TUNING"
    kind = "prompt tuning"
    marker = "prompt_encoder"
    shape_keys = "num_virtual_tokens and token_dim"
    shared_names: ClassVar = {"rows": EMBEDDINGS}
    keys: ClassVar = ConfigKeys(
        applied=SIZE_KEYS,
        refused={"modules_to_save": "fully trained modules"},
        extras=frozenset(),
        ignorable=frozenset(
            {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"}
        ),
    )

    count: int
    bias: str = "none"
    extras: Extras = NO_EXTRAS

    @classmethod
    def parse(cls, raw: Mapping[str, object]) -> Self:
        """See Tuner."""
        config = PeftConfig(raw, cls.keys, cls.peft_type)
        check_submodules(config)
        return cls(count=config.rank("num_virtual_tokens"), **cls.options(config))

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """The method's own fields. Raises AdapterInvalid naming the key."""
        return {}

    @property
    def virtual_tokens(self) -> int:
        """See AdapterSpec."""
        return self.count

    @classmethod
    def suffixes(cls, kind: ModuleKind) -> Mapping[str, str]:
        """See Tuner."""
        return {}

    def resolve(self, base: BaseModelSpec, limits: ReadLimits) -> Targets:
        """See Tuner."""
        check_virtual_tokens(self.count, base)
        if base.embedding is None:
            raise AdapterIncompatible(
                f"{CONFIG_FILE}: this base has no input embedding that virtual tokens could stand beside",
                subject=f"{CONFIG_FILE}: peft_type",
                remedy="train with a method that adapts linear layers",
            )
        return Targets({base.embedding: PromptTarget()}, self.shared(base))

    def shared(self, base: BaseModelSpec) -> Mapping[str, Shape]:
        """The tensors of the file, by role."""
        return {"rows": (self.count, base.hidden_size)}

    def arithmetic(self, targets: Targets) -> dict[str, Any]:
        """See Tuner."""
        return {"kind": "prompt"}


@dataclass(frozen=True)
class PTuner(PromptTuner):
    """P-tuning."""

    peft_type = "P_TUNING"
    kind = "p-tuning"
    keys: ClassVar = ConfigKeys(
        applied=SIZE_KEYS,
        refused={"modules_to_save": "fully trained modules"},
        extras=frozenset(),
        ignorable=frozenset(
            {"encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"}
        ),
    )


@dataclass(frozen=True)
class MultitaskPromptTuner(PromptTuner):
    """Multitask prompts of one task."""

    peft_type = "MULTITASK_PROMPT_TUNING"
    kind = "multitask prompt tuning"
    shared_names: ClassVar = {"rows": EMBEDDINGS, "task_columns": "prefix_task_cols", "task_rows": "prefix_task_rows"}
    keys: ClassVar = ConfigKeys(
        applied=SIZE_KEYS | {"num_ranks", "num_tasks"},
        refused={"modules_to_save": "fully trained modules"},
        extras=frozenset(),
        ignorable=PromptTuner.keys.ignorable | {"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"},
    )

    ranks: int = 1

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See PromptTuner. A request names an adapter and no task."""
        tasks = config.rank("num_tasks", 1)
        if tasks != 1:
            raise bad_key(
                "num_tasks",
                f"the file holds the prompts of {tasks} tasks, and a request names one adapter",
                "save each task as an adapter of its own, with num_tasks=1 and its row of prefix_task_cols and _rows",
            )
        return {"ranks": config.rank("num_ranks", 1)}

    def resolve(self, base: BaseModelSpec, limits: ReadLimits) -> Targets:
        """See Tuner."""
        check_rank(self.ranks, limits, "num_ranks")
        return super().resolve(base, limits)

    def shared(self, base: BaseModelSpec) -> Mapping[str, Shape]:
        """See PromptTuner."""
        return {
            "rows": (self.count, base.hidden_size),
            "task_columns": (1, self.count, self.ranks),
            "task_rows": (1, self.ranks, base.hidden_size),
        }

    def arithmetic(self, targets: Targets) -> dict[str, Any]:
        """See Tuner."""
        return {"kind": "multitask prompt"}


def check_submodules(config: PeftConfig) -> None:
    """Raises AdapterInvalid for an encoder-decoder's adapter."""
    if config.raw.get("num_transformer_submodules") not in (None, 1):
        raise bad_key(
            "num_transformer_submodules",
            "an adapter of an encoder and a decoder has no meaning for this base",
            "train on a decoder, with task_type CAUSAL_LM",
        )


def check_virtual_tokens(count: int, base: BaseModelSpec) -> None:
    """Raises AdapterIncompatible where virtual tokens leave nothing of the context, or other tables read token ids."""
    if count >= base.context_length:
        raise AdapterIncompatible(
            f"{CONFIG_FILE}: {count} virtual tokens leave no room in the context of {base.context_length}",
            subject=f"{CONFIG_FILE}: num_virtual_tokens",
            remedy="train with fewer virtual tokens",
        )
    for name, module in base.modules.items():
        if module.kind == "embedding" and name != base.embedding and module.in_features == base.vocab_size:
            raise AdapterIncompatible(
                f"{CONFIG_FILE}: virtual tokens are embeddings, and this base also looks token ids up in {name}",
                subject=f"{CONFIG_FILE}: peft_type",
                remedy="train with a method that adapts linear layers",
            )
