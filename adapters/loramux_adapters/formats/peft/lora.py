"""LoRA as PEFT writes it: B A at a rank and a scale per module, with magnitudes (DoRA) and a bias on lora_B.

Hu et al., 2021; rank-stabilized: Kalajdzievski, 2023; DoRA: Liu et al., 2024. Whatever drew the initial values
(Gaussian, EVA, orthogonal) and whatever optimizer trained them (LoRA+), the result is read alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.finite import is_finite
from loramux_adapters.formats.digest import low_rank_config
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import SELECTION_KEYS, ConfigKeys, PeftConfig, bad_key
from loramux_adapters.formats.peft.extras import NO_EXTRAS, Extras
from loramux_adapters.formats.peft.name_keys import NameKeys
from loramux_adapters.formats.peft.selection import LINEAR, LINEAR_AND_EMBEDDING, Selection, select_modules
from loramux_adapters.formats.peft.tuner import Shape, Target, Targets, Tuner
from loramux_adapters.formats.refusals import quote
from loramux_adapters.parts.bias import Bias
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.magnitude import Magnitude
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleKind, ModuleSpec

# fan_in_fan_out is ignorable because PEFT stores A [r, in] and B [out, r] either way, and corrects the flag itself.
# The configs of initializations only say how training began: init_lora_weights tells whether the base was moved.
KEYS = ConfigKeys(
    applied=SELECTION_KEYS
    | {
        "alora_invocation_tokens", "alpha_pattern", "ensure_weight_tying", "init_lora_weights", "lora_alpha",
        "lora_bias", "r", "rank_pattern", "trainable_token_indices", "use_dora", "use_rslora",
    },
    refused={
        "arrow_config": "Arrow routing",
        "kasa_config": "KaSA adapters, which change the base,",
        "layer_replication": "replicated layers",
        "megatron_config": "Megatron layers",
        "monteclora_config": "Monte Carlo adapters",
        "target_parameters": "adapters on the experts and routers of mixture-of-experts models",
        "use_bdlora": "block-diagonal adapters",
        "use_qalora": "QA-LoRA adapters",
        "velora_config": "VeLoRA adapters",
    },
    ignorable=frozenset(
        {
            "corda_config", "eva_config", "fan_in_fan_out", "loftq_config", "lora_dropout", "lora_ga_config",
            "megatron_core", "qalora_group_size",
        }
    ),
)  # fmt: skip

_UNMOVED_INITS = {"gaussian", "eva", "orthogonal", "mica"}
_MOVING_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")

LINEAR_SUFFIXES = {"a": ".lora_A.weight", "b": ".lora_B.weight"}
EMBEDDING_SUFFIXES = {"a": ".lora_embedding_A", "b": ".lora_embedding_B"}
_LINEAR_EXTRAS = {"b_bias": ".lora_B.bias", "magnitude": ".lora_magnitude_vector"}
_EMBEDDING_EXTRAS = {"magnitude": ".lora_magnitude_vector"}


@dataclass(frozen=True)
class LoraTarget(Target):
    """One module: `scale` is the factor on B A."""

    module: ModuleSpec
    rank_: int
    scale: float
    has_bias: bool = False
    has_magnitude: bool = False

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        out = (self.module.out_features,)
        shapes: dict[str, Shape] = {"a": (self.rank_, self.module.in_features), "b": (*out, self.rank_)}
        if self.has_bias and self.module.kind != "embedding":
            shapes["b_bias"] = out
        if self.has_magnitude:
            shapes["magnitude"] = out
        return shapes

    def rank(self, found: Mapping[str, Shape]) -> int:
        """See Target."""
        return self.rank_

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        a, b = tensors["a"], tensors["b"].float() * self.scale
        if not is_finite(b):
            raise AdapterInvalid(
                f"{CONFIG_FILE}: scale {self.scale:g} makes lora_B of module {quote(self.module.name)} infinite",
                subject=f"{CONFIG_FILE}: lora_alpha",
                remedy="check lora_alpha and alpha_pattern",
            )
        if "initial_a" in tensors:  # the base has lost these: (W - B0 A0) + B A
            a = torch.cat([a.float(), tensors["initial_a"].float()])
            b = torch.cat([b, tensors["initial_b"].float() * -self.scale], dim=1)
        low_rank = LowRank(a, b)
        parts: list[Part] = [low_rank]
        if "magnitude" in tensors:
            parts.append(Magnitude(tensors["magnitude"].float(), low_rank))
        if "b_bias" in tensors:
            parts.append(Bias(tensors["b_bias"].float() * self.scale, base_share=1.0))
        return tuple(parts)


@dataclass(frozen=True)
class LoraTuner(Tuner):
    """The arithmetic of one config."""

    peft_type = "LORA"
    kind = "lora"
    keys = KEYS
    marker = ".lora_"
    shape_keys = "r and rank_pattern"

    selection: Selection
    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]  # in the order of the file, which decides between matching keys
    alpha_pattern: Mapping[str, float]
    use_dora: bool
    lora_bias: bool
    bias: str
    extras: Extras = NO_EXTRAS
    moved_by: str | None = None
    invocation_tokens: tuple[int, ...] = ()

    @property
    def variant(self) -> str:
        """See Tuner."""
        return "dora" if self.use_dora else "alora" if self.invocation else self.kind

    @property
    def moved_base(self) -> str | None:
        """See Tuner."""
        return self.moved_by

    @property
    def invocation(self) -> tuple[int, ...]:
        """See AdapterSpec."""
        return self.invocation_tokens

    @classmethod
    def parse(cls, raw: Mapping[str, object]) -> LoraTuner:
        """See Tuner."""
        config = PeftConfig(raw, KEYS, cls.peft_type)
        tuner = cls(
            selection=Selection.parse(config),
            r=config.rank("r", 8),
            alpha=config.number("lora_alpha", 8),
            use_rslora=config.flag("use_rslora"),
            rank_pattern=config.ranks("rank_pattern"),
            alpha_pattern=config.numbers("alpha_pattern"),
            use_dora=config.flag("use_dora"),
            lora_bias=config.flag("lora_bias"),
            bias=config.choice("bias", ("none", "all", "lora_only"), "none"),
            extras=Extras.parse(config),
            moved_by=_moved_by(raw.get("init_lora_weights", True)),
            invocation_tokens=config.ids("alora_invocation_tokens"),
        )
        if tuner.invocation and (tuner.use_dora or tuner.bias != "none" or tuner.extras != NO_EXTRAS):
            raise bad_key(
                "alora_invocation_tokens",
                "cannot go with use_dora, bias, modules_to_save or trainable_token_indices",
                "train with one of them",
            )
        if tuner.use_dora and tuner.lora_bias:
            # PEFT takes the bias for a part of the weight when it measures its rows: no formula of either paper.
            raise bad_key("lora_bias", "cannot go with use_dora", "train with one of them")
        if tuner.lora_bias and tuner.bias != "none":
            raise bad_key("lora_bias", "cannot go with bias", "train with one of them")
        return tuner

    @classmethod
    def suffixes(cls, kind: ModuleKind) -> Mapping[str, str]:
        """See Tuner."""
        if kind == "embedding":
            return EMBEDDING_SUFFIXES | _EMBEDDING_EXTRAS
        return LINEAR_SUFFIXES | _LINEAR_EXTRAS

    def scale(self, rank: int, alpha: float) -> float:
        """The factor on B A. Source: https://huggingface.co/papers/2312.03732 for the square root."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def resolve(self, base: BaseModelSpec, limits: ReadLimits) -> Targets:
        """See Tuner."""
        budget = RegexBudget(limits)
        rank_keys = NameKeys(self.rank_pattern, f"{CONFIG_FILE}: rank_pattern", budget)
        alpha_keys = NameKeys(self.alpha_pattern, f"{CONFIG_FILE}: alpha_pattern", budget)
        if any(token >= base.vocab_size for token in self.invocation):
            raise AdapterIncompatible(
                f"{CONFIG_FILE}: alora_invocation_tokens: an id is over the vocabulary of {base.vocab_size}",
                subject=f"{CONFIG_FILE}: alora_invocation_tokens",
                remedy="upload an adapter made for this base",
            )
        adaptable = LINEAR if self.invocation else LINEAR_AND_EMBEDDING  # PEFT activates no embedding
        selected = select_modules(self.selection, base, budget, adaptable)
        targets = {}
        for name in selected.names:
            rank_key, alpha_key = rank_keys.find(name), alpha_keys.find(name)
            rank = self.r if rank_key is None else self.rank_pattern[rank_key]
            alpha = self.alpha if alpha_key is None else self.alpha_pattern[alpha_key]
            targets[name] = LoraTarget(base.modules[name], rank, self.scale(rank, alpha), self.lora_bias, self.use_dora)
        return Targets(targets, tied_head=selected.tied_head)

    def arithmetic(self, targets: Targets) -> dict[str, Any]:
        """Ranks, targets and biases are in the tensors' names and shapes already."""
        scales = {name: target.scale for name, target in targets.modules.items() if isinstance(target, LoraTarget)}
        return low_rank_config(scales) | ({"invocation": list(self.invocation)} if self.invocation else {})


def _moved_by(value: object) -> str | None:
    """The initialization, where it subtracts from the base. Raises AdapterInvalid for one that is not known."""
    if value is None or isinstance(value, bool):
        return None
    name = value.lower() if isinstance(value, str) else ""
    if name.startswith(_MOVING_INITS):
        return name
    if name not in _UNMOVED_INITS:
        raise bad_key("init_lora_weights", f"{quote(value)} is not a known initialization", "train with a known one")
    return None
