"""adapter_config.json as AdapterHub's package writes it: every key is applied, refused, or changes no number.

Source: adapters 1.3.0, `BnConfig` and `methods/modeling.py`. Torch-free; knows no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.adapterhub.interface import Interface
from loramux_adapters.formats.refusals import quote
from loramux_adapters.spec import BaseModelSpec
from loramux_adapters.sublayers import ARCHITECTURES, Place

_OUTER_APPLIED = frozenset({"config", "hidden_size", "model_type", "name", "version"})
_OUTER_IGNORABLE = frozenset({"config_id", "id2label", "label2id", "model_class", "model_name", "type"})
_APPLIED = frozenset(
    {
        "adapter_residual_before_ln", "architecture", "is_parallel", "leave_out", "ln_after", "ln_before", "mh_adapter",
        "non_linearity", "original_ln_after", "original_ln_before", "output_adapter", "reduction_factor",
        "residual_before_ln", "scaling",
    }
)  # fmt: skip
_IGNORABLE = frozenset(
    {
        "cross_adapter", "dropout", "factorized_phm_W", "factorized_phm_rule", "hypercomplex_nonlinearity",
        "init_weights", "init_weights_seed", "inv_adapter_reduction_factor", "learn_phm", "phm_bias", "phm_c_init",
        "phm_dim", "phm_init_range", "phm_rank", "shared_W_phm", "shared_phm_rule", "stochastic_depth",
    }
)  # fmt: skip
# Options of bottlenecks that are not read -> (what they are called, why).
_REFUSED = {
    "phm_layer": ("Compacter's hypercomplex layers", "their weights are shared between layers and are not read"),
    "inv_adapter": ("invertible adapters", "they act on the embeddings, where no part of that kind is served"),
    "invertible_adapter": ("invertible adapters", "they act on the embeddings, where no part of that kind is served"),
    "use_gating": ("gates", "a gate is a mean over the whole sequence, tokens that are not generated yet included"),
}
_METHODS = {
    "lora": "LoRA and its kin in AdapterHub's format are",
    "mtl_lora": "multi-task LoRA is",
    "prefix_tuning": "prefix tuning in AdapterHub's format is",
    "prompt_tuning": "prompt tuning in AdapterHub's format is",
    "reft": "ReFT is",
    "union": "unions of methods (MAM, UniPELT) are",
}

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "leaky_relu": "leaky_relu",
    "leakyrelu": "leaky_relu",
    "linear": "linear",
    "mish": "mish",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""The package's name -> that of `parts.bottleneck`."""
# What names meant before configs had a version.
_EARLIER_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}

# Below it, an adapter would be wider than any base; and a number near 0 makes the width infinite.
_LEAST_REDUCTION = 2**-10
# It is repeated in the name of every tensor.
_MAX_NAME_CHARS = 256

_SAVE_AGAIN = "save the adapter again with a current version of adapters"
_TRAIN_WITHOUT = "train without it"


@dataclass(frozen=True)
class HubConfig:
    """A bottleneck config; `scaling` is a number or whose numbers the file has, `residual` what is added back."""

    name: str  # the adapter's own, which is in the names of its tensors
    model_type: str
    hidden_size: int
    places: frozenset[Place]
    left_out: frozenset[int]  # layers
    reduction: float | Mapping[str, float]
    activation: str
    is_parallel: bool
    scaling: float | Literal["learned", "channel"]
    ln_before: bool
    ln_after: bool
    original_ln_before: bool
    original_ln_after: bool
    residual_before_ln: bool
    residual_in_norm: bool

    def width(self, layer: int) -> int:
        """Units of the bottleneck of one layer. Raises AdapterInvalid."""
        reduction = self.reduction
        if isinstance(reduction, Mapping):
            if str(layer) not in reduction and "default" not in reduction:
                raise bad_key(
                    "reduction_factor", f"has no number for layer {layer}, and no default", "add a key default"
                )
            reduction = reduction.get(str(layer), reduction.get("default", 1.0))
        return max(1, int(self.hidden_size // reduction))

    def check(self, base: BaseModelSpec, interface: Interface) -> None:
        """Raises AdapterIncompatible where it is for another base, or has no one meaning on this one."""
        if self.model_type != base.architecture:
            raise _other_base("model_type", f"{quote(self.model_type)} is not {quote(base.architecture)}")
        if self.hidden_size != base.hidden_size:
            raise _other_base("hidden_size", f"{self.hidden_size} is not the base's {base.hidden_size}")
        if base.architecture not in ARCHITECTURES:
            raise AdapterIncompatible(
                f"{CONFIG_FILE}: model_type: bottlenecks have no place in layers of {quote(base.architecture)}",
                subject=f"{CONFIG_FILE}: model_type",
                remedy=f"they have one in {', '.join(ARCHITECTURES)}",
            )
        if interface.is_hooked and not self.original_ln_after:
            raise bad_key(
                "original_ln_after",
                f"false has no meaning on {base.architecture}, where adapters are hooked to the model's modules: the "
                "model adds the residual by itself, and adapters raises",
                "train with original_ln_after=True",
            )
        if interface.has_norms and self.original_ln_before:
            raise bad_key(
                "original_ln_before",
                f"on {base.architecture} adapters applies the norm of the last layer in all of them",
                "train with original_ln_before=False (double_seq_bn), or with par_bn",
            )


def is_adapterhub(raw: Mapping[str, object]) -> bool:
    """Whether a config is one of AdapterHub's: PEFT's have another shape."""
    return "peft_type" not in raw and "config" in raw


def parse(raw: Mapping[str, object]) -> HubConfig:
    """Checks every key. Raises AdapterInvalid naming the key."""
    _check_keys(raw, _OUTER_APPLIED, _OUTER_IGNORABLE)
    inner = raw["config"]
    if not isinstance(inner, dict):
        raise bad_key("config", f"{quote(inner)} names a configuration and is none", _SAVE_AGAIN)
    _check_method(inner)
    _check_keys(inner, _APPLIED, _IGNORABLE)
    is_parallel, ln_after = _flag(inner, "is_parallel", False), _flag(inner, "ln_after", False)
    return HubConfig(
        name=_text(raw, "name"),
        model_type=_text(raw, "model_type"),
        hidden_size=_count(raw, "hidden_size"),
        places=_places(inner),
        left_out=_layers(inner, "leave_out"),
        reduction=_reduction(inner),
        activation=_activation(inner, has_version="version" in raw),
        is_parallel=is_parallel,
        scaling=_scaling(inner),
        ln_before=_flag(inner, "ln_before", False),
        ln_after=ln_after,
        original_ln_before=_flag(inner, "original_ln_before", False) and not is_parallel,
        original_ln_after=_flag(inner, "original_ln_after", True),
        residual_before_ln=is_parallel or _residual_before_ln(inner),
        residual_in_norm=ln_after and not is_parallel and _flag(inner, "adapter_residual_before_ln", False),
    )


def bad_key(key: str, what: str, remedy: str) -> AdapterInvalid:
    """The refusal of one key."""
    return AdapterInvalid(f"{CONFIG_FILE}: {key}: {what}", subject=f"{CONFIG_FILE}: {key}", remedy=remedy)


def _other_base(key: str, what: str) -> AdapterIncompatible:
    return AdapterIncompatible(
        f"{CONFIG_FILE}: {key}: {what}",
        subject=f"{CONFIG_FILE}: {key}",
        remedy="upload an adapter made for this base",
    )


def _check_method(inner: Mapping[str, object]) -> None:
    method = inner.get("architecture")
    if method is not None:
        what = _METHODS.get(method, f"{quote(method)} is") if isinstance(method, str) else f"{quote(method)} is"
        raise bad_key(
            "architecture",
            f"{what} not read; of AdapterHub's methods bottlenecks are (seq_bn, double_seq_bn, par_bn, adapter_plus)",
            "train with PEFT what PEFT has",
        )
    for key, (what, why) in _REFUSED.items():
        if inner.get(key):
            raise bad_key(key, f"{what} are not supported: {why}", _TRAIN_WITHOUT)


def _check_keys(raw: Mapping[str, object], applied: frozenset[str], ignorable: frozenset[str]) -> None:
    for key, value in raw.items():
        is_empty = value is None or value is False or value in ("", [], {})
        if key not in applied and key not in ignorable and not is_empty:
            raise bad_key(quote(key), "is not a known option", "remove it if it changes nothing")


def _places(inner: Mapping[str, object]) -> frozenset[Place]:
    keys: dict[Place, str] = {"attention": "mh_adapter", "mlp": "output_adapter"}
    places: frozenset[Place] = frozenset(place for place, key in keys.items() if _flag(inner, key, None))
    if not places:
        raise bad_key("output_adapter", "neither it nor mh_adapter is set: the adapter is nowhere", _SAVE_AGAIN)
    return places


def _activation(inner: Mapping[str, object], *, has_version: bool) -> str:
    name = _text(inner, "non_linearity")
    name = name if has_version else _EARLIER_ACTIVATIONS.get(name, name)
    if name.lower() not in _ACTIVATIONS:
        raise bad_key("non_linearity", f"{quote(name)} is not supported", f"use one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name.lower()]


def _scaling(inner: Mapping[str, object]) -> float | Literal["learned", "channel"]:
    value = inner.get("scaling", 1.0)
    if value == "learned":
        return "learned"
    return "channel" if value == "channel" else _number("scaling", value)


def _reduction(inner: Mapping[str, object]) -> float | Mapping[str, float]:
    value = inner.get("reduction_factor")
    numbers = value if isinstance(value, dict) else {"": value}
    read = {layer: _number("reduction_factor", number) for layer, number in numbers.items()}
    if not read or min(read.values()) < _LEAST_REDUCTION:
        raise bad_key("reduction_factor", f"{quote(value)} is below {_LEAST_REDUCTION}", _SAVE_AGAIN)
    return read if isinstance(value, dict) else read[""]


def _residual_before_ln(inner: Mapping[str, object]) -> bool:
    if inner.get("residual_before_ln") == "post_add":
        raise bad_key(
            "residual_before_ln",
            "post_add is for layers that normalize behind a sub-layer: adapters itself raises in those of decoders",
            "train with true or false",
        )
    return _flag(inner, "residual_before_ln", True)


def _layers(inner: Mapping[str, object], key: str) -> frozenset[int]:
    value: Any = inner.get(key) or []
    if not isinstance(value, list) or not all(type(layer) is int for layer in value):
        raise bad_key(key, "must be a list of layer numbers", _SAVE_AGAIN)
    return frozenset(value)


def _flag(raw: Mapping[str, object], key: str, default: bool | None) -> bool:
    """True or false; without a default it must be there."""
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise bad_key(key, f"{quote(value)} is neither true nor false", _SAVE_AGAIN)
    return value


def _text(raw: Mapping[str, object], key: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME_CHARS:
        raise bad_key(key, f"{quote(value)} is no text of 1 to {_MAX_NAME_CHARS} characters", _SAVE_AGAIN)
    return value


def _count(raw: Mapping[str, object], key: str) -> int:
    value = raw.get(key)
    if type(value) is not int or value < 1:
        raise bad_key(key, f"{quote(value)} is not a whole number from 1", _SAVE_AGAIN)
    return value


def _number(key: str, value: object) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise bad_key(key, f"{quote(value)} is not a finite number", _SAVE_AGAIN)
    return number
