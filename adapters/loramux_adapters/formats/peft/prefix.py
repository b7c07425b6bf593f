"""Prefix tuning and cartridges: trained keys and values of every layer before the prompt, saved alike.

Li and Liang, 2021; Eyuboglu et al., 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.config import ConfigKeys, PeftConfig
from loramux_adapters.formats.peft.extras import NO_EXTRAS, Extras
from loramux_adapters.formats.peft.prompts import EMBEDDINGS, SIZE_KEYS, check_submodules, check_virtual_tokens
from loramux_adapters.formats.peft.tuner import Shape, Target, Targets, Tuner
from loramux_adapters.parts.kv_prefix import KvPrefix
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleKind


@dataclass(frozen=True)
class PrefixTarget(Target):
    """One layer's keys and values."""

    layer: int
    layers: int

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """It has no tensors of its own."""
        return {}

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """A row holds keys and values of layer after layer."""
        rows = tensors["rows"]
        width = rows.shape[1] // self.layers
        return (KvPrefix(rows[:, self.layer * width : (self.layer + 1) * width].float().clone()),)


@dataclass(frozen=True)
class PrefixTuner(Tuner):
    """See the module."""

    peft_type = "PREFIX_TUNING"
    kind = "prefix tuning"
    marker = "prompt_encoder"
    shape_keys = "num_virtual_tokens, num_layers and token_dim"
    shared_names: ClassVar = {"rows": EMBEDDINGS}
    keys: ClassVar = ConfigKeys(
        applied=SIZE_KEYS,
        refused={"modules_to_save": "fully trained modules"},
        extras=frozenset(),
        ignorable=frozenset({"encoder_hidden_size", "init_weights", "prefix_projection"}),
    )

    count: int
    layers: int
    heads: int
    width: int
    bias: str = "none"
    extras: Extras = NO_EXTRAS

    @classmethod
    def parse(cls, raw: Mapping[str, object]) -> Self:
        """See Tuner."""
        config = PeftConfig(raw, cls.keys, cls.peft_type)
        check_submodules(config)
        return cls(
            count=config.rank("num_virtual_tokens"),
            layers=config.rank("num_layers"),
            heads=config.rank("num_attention_heads"),
            width=config.rank("token_dim"),
        )

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
        if base.kv_heads is None or base.kv_width is None:
            raise AdapterIncompatible(
                f"{CONFIG_FILE}: layers of this {base.architecture} base differ in the size of their keys and values",
                subject=f"{CONFIG_FILE}: peft_type",
                remedy="train with another method",
            )
        theirs = (self.layers, self.heads, self.width)
        ours = (base.num_layers, base.kv_heads, base.kv_heads * base.kv_width)
        if theirs != ours:
            raise AdapterIncompatible(
                f"{CONFIG_FILE}: num_layers, num_attention_heads and token_dim are {theirs}, the base has {ours}",
                subject=f"{CONFIG_FILE}: token_dim",
                remedy="upload an adapter made for this base",
            )
        targets = {base.attention_name(layer): PrefixTarget(layer, self.layers) for layer in range(self.layers)}
        return Targets(targets, {"rows": (self.count, 2 * self.layers * self.width)})

    def arithmetic(self, targets: Targets) -> dict[str, Any]:
        """See Tuner."""
        return {"kind": "prefix"}


@dataclass(frozen=True)
class CartridgeTuner(PrefixTuner):
    """Cartridges."""

    peft_type = "CARTRIDGE"
    kind = "cartridge"
    keys: ClassVar = ConfigKeys(
        applied=SIZE_KEYS,
        refused={"modules_to_save": "fully trained modules"},
        extras=frozenset(),
        ignorable=frozenset({"num_frozen_tokens"}),
    )
