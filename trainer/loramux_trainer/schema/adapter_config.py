"""The sections of a job that give an adapter its shape, one per family of methods. Torch-free.

Keys are named as in PEFT's LoraConfig, AdaLoraConfig, PromptTuningConfig, PromptEncoderConfig and PrefixTuningConfig,
in AdapterHub's configurations of bottleneck adapters and in GaLore's optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator

from loramux_adapters.formats.limits import MAX_RANK
from loramux_adapters.validation import Number, OneOrMore, Section, Text, YesNo
from loramux_trainer.schema.fields import AlphaPattern, Count, Index, Positive, Rank, RankPattern, Share

T = TypeVar("T")
Targets = str | tuple[str, ...]


@dataclass(frozen=True)
class LoraConfig(Section):
    """Which modules are adapted, and the shape of low-rank adapters.

    `target_modules`: all-linear, a list of name suffixes, or one regular expression for full names. Where keys of
    `rank_pattern` and `alpha_pattern` match a module, the first that does replaces `rank` and `alpha` there.
    """

    target_modules: OneOrMore = "all-linear"
    exclude_modules: OneOrMore | None = None
    layers_to_transform: tuple[Index, ...] | None = None
    layers_pattern: OneOrMore | None = None
    feedforward_modules: OneOrMore | None = None  # of IA3: scaled at their inputs
    rank: Rank = 16
    alpha: Positive = 32.0
    rank_pattern: RankPattern = field(default_factory=dict)
    alpha_pattern: AlphaPattern = field(default_factory=dict)
    use_rslora: YesNo = False
    dropout: Share = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    trainable_token_indices: tuple[Index, ...] | None = None
    loraplus_lr_ratio: Positive | None = None  # learning rate of B over that of A
    rank_budget: Rank | None = None  # of an export in delta form, which has twice the rank

    @field_validator("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules")
    @classmethod
    def _is_of_something(cls, targets: Targets | None) -> Targets | None:
        if targets is not None and not targets:
            raise ValueError("names no module")
        return targets

    @field_validator("layers_to_transform", "trainable_token_indices")
    @classmethod
    def _has_items(cls, indices: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if indices is not None and not indices:
            raise ValueError("is an empty list; leave it out, or give at least one")
        return indices

    @field_validator("layers_to_transform")
    @classmethod
    def _can_choose_layers(cls, layers: T, others: ValidationInfo) -> T:
        targets = others.data.get("target_modules")
        if layers is not None and isinstance(targets, str) and targets != "all-linear":
            raise ValueError("cannot go with a regular expression in lora.target_modules; write the layers into it")
        return layers

    @field_validator("layers_pattern")
    @classmethod
    def _has_layers(cls, pattern: T, others: ValidationInfo) -> T:
        if pattern is not None and others.data.get("layers_to_transform", ()) is None:
            raise ValueError("needs lora.layers_to_transform; give both or neither")
        return pattern

    def scale(self, rank: int, alpha: float) -> float:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) with rslora."""
        return alpha / (rank**0.5 if self.use_rslora else rank)


@dataclass(frozen=True)
class AdaloraConfig(Section):
    """How AdaLoRA prunes `init_r` to `lora.rank` on average (PEFT's target_r), between steps `tinit` and
    total - `tfinal`, every `delta_t` steps; tinit and tfinal below 1 are shares of all steps.
    """

    init_r: Rank | None = None  # None: one and a half times lora.rank
    tinit: Annotated[Number, Field(ge=0)] = 0.1
    tfinal: Annotated[Number, Field(ge=0)] = 0.3
    delta_t: Count = 10
    beta1: Share = 0.85
    beta2: Share = 0.85
    orth_reg_weight: Positive = 0.5


@dataclass(frozen=True)
class BitfitConfig(Section):
    """Which vectors of the base get a trained change: biases (BitFit), weights of norms (LN-tuning), or both."""

    biases: YesNo = True
    norms: YesNo = False

    @field_validator("norms")
    @classmethod
    def _trains_something(cls, norms: bool, others: ValidationInfo) -> bool:
        if not norms and others.data.get("biases") is False:
            raise ValueError("must be true where bitfit.biases is false: nothing would be trained")
        return norms


@dataclass(frozen=True)
class PromptConfig(Section):
    """Virtual tokens of prompt tuning, P-tuning and prefix tuning."""

    num_virtual_tokens: Count = 20
    prompt_tuning_init_text: Text | None = None  # prompt: starts as this text's embeddings; None: as random tokens'
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"  # of p-tuning
    encoder_hidden_size: Count | None = None  # of p-tuning, and of prefix with a projection; None: the base's width
    encoder_num_layers: Count = 2  # of p-tuning's LSTM
    prefix_projection: YesNo = False  # prefix: keys and values by an MLP


@dataclass(frozen=True)
class BottleneckConfig(Section):
    """Bottleneck adapters: Houlsby after attention and MLP, Pfeiffer after the MLP, parallel beside it."""

    kind: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    reduction_factor: Annotated[Number, Field(ge=1)] = 16.0  # width of the base over width of the bottleneck
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"


@dataclass(frozen=True)
class GaloreConfig(Section):
    """GaLore: gradients projected to `rank`, by a projection made anew every `update_proj_gap` steps.

    The factors add up to an adapter of rank periods x `rank`, compressed where that goes over `rank_budget`.
    """

    rank: Rank = 16
    update_proj_gap: Count = 200
    scale: Positive = 0.25
    rank_budget: Rank = MAX_RANK


SHAPES: Mapping[str, type[Section]] = {
    "lora": LoraConfig,
    "adalora": AdaloraConfig,
    "bitfit": BitfitConfig,
    "prompt": PromptConfig,
    "bottleneck": BottleneckConfig,
    "galore": GaloreConfig,
}
"""Section of a job -> its class."""
