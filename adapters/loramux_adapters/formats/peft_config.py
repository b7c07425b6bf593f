"""adapter_config.json as PEFT writes it: which keys are applied, which are refused, which change no number.

A key in none of the lists passes only when it is null, false or empty, so that an option of a later PEFT is
refused rather than left out in silence. Torch-free; knows no base and no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.formats.refusals import quote

APPLIED = frozenset(
    {
        "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules", "task_type",
        "use_rslora",
    }
)  # fmt: skip

REFUSED = {
    "alora_invocation_tokens": "aLoRA adapters",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA adapters, which change the base,",
    "layer_replication": "replicated layers",
    "lora_bias": "a bias on lora_B",
    "megatron_config": "Megatron layers",
    "modules_to_save": "fully trained modules",
    "monteclora_config": "Monte Carlo adapters",
    "target_parameters": "adapters on the experts and routers of mixture-of-experts models",
    "trainable_token_indices": "trained token rows",
    "use_bdlora": "block-diagonal adapters",
    "use_dora": "DoRA adapters",
    "use_qalora": "QA-LoRA adapters",
    "velora_config": "VeLoRA adapters",
}
"""Options that change the arithmetic and are not read: config key -> what the message calls them."""

# fan_in_fan_out is here because PEFT stores A [r, in] and B [out, r] either way, and corrects the flag itself.
# The configs of initializations only say how training began: init_lora_weights tells whether the base was moved.
IGNORABLE = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
        "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
        "revision", "runtime_config",
    }
)  # fmt: skip

# PEFT computes the same deltas for all of them; what a task adds (a classifier's head) is refused for itself.
_TASKS = {"CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS"}
# What PEFT calls the heads of tasks that generate no text.
_TASK_HEADS = {"classifier", "score", "qa_outputs"}
# A number no model has: above it, r is nonsense rather than a rank over this server's limit.
_MAX_SANE_RANK = 65_536
# More than any base has modules.
_MAX_PATTERN_KEYS = 8_192
_UNMOVED_INITS = {"gaussian", "eva", "orthogonal", "mica"}
_MOVING_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")

Names = str | frozenset[str]
T = TypeVar("T")


@dataclass(frozen=True)
class PeftLoraConfig:
    """The arithmetic of one adapter_config.json. A str in a names field is a regular expression, as in PEFT."""

    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]  # in the order of the file, which decides between matching keys
    alpha_pattern: Mapping[str, float]
    target_modules: Names
    exclude_modules: Names
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    bias: str  # "none", "all" or "lora_only"
    ensure_weight_tying: bool

    def scale(self, rank: int, alpha: float) -> float:
        """The factor on B A. Source: https://huggingface.co/papers/2312.03732 for the square root."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_config(raw: Mapping[str, object]) -> PeftLoraConfig:
    """Check every key of a parsed adapter_config.json. Raises AdapterInvalid naming the key."""
    if raw.get("peft_type") != "LORA":
        raise _bad("peft_type", f"{quote(raw.get('peft_type'))} is not supported", "upload a LoRA adapter")
    for key, value in raw.items():
        _check_key(key, value, raw)
    _check_task(raw.get("task_type"))
    _check_init(raw.get("init_lora_weights", True))
    config = PeftLoraConfig(
        r=_rank("r", raw.get("r", 8)),
        alpha=_number("lora_alpha", raw.get("lora_alpha", 8)),
        use_rslora=_flag(raw, "use_rslora"),
        rank_pattern=_pattern_table(raw, "rank_pattern", _rank),
        alpha_pattern=_pattern_table(raw, "alpha_pattern", _number),
        target_modules=_names("target_modules", raw.get("target_modules")),
        exclude_modules=_names("exclude_modules", raw.get("exclude_modules") or []),
        layers_to_transform=_layers(raw.get("layers_to_transform")),
        layers_pattern=_strings("layers_pattern", raw.get("layers_pattern") or []),
        bias=_bias(raw.get("bias", "none")),
        ensure_weight_tying=_flag(raw, "ensure_weight_tying"),
    )
    if isinstance(config.target_modules, str) and raw.get("layers_to_transform") is not None:
        raise _bad("layers_to_transform", "cannot go with a target_modules pattern", "list the modules")
    if config.layers_pattern and raw.get("layers_to_transform") is None:
        raise _bad("layers_pattern", "needs layers_to_transform", "give both or neither")
    return config


def _check_key(key: str, value: object, raw: Mapping[str, object]) -> None:
    if key in APPLIED or key in IGNORABLE or value is None or value is False or value in ("", [], {}):
        return
    if key in REFUSED:
        raise _bad(key, f"{REFUSED[key]} are not supported", _remedy(key, value, raw))
    raise _bad(key, "is not a known option", "remove it if it changes nothing")


def _remedy(key: str, value: object, raw: Mapping[str, object]) -> str:
    if key == "target_parameters":
        return _remedy_for_experts(raw.get("target_modules"))
    if key == "modules_to_save" and isinstance(value, list) and _TASK_HEADS.intersection(map(str, value)):
        return "the head of a classifier generates no text: only adapters without one are served"
    return "train with plain LoRA or rsLoRA"


def _remedy_for_experts(modules: object) -> str:
    """PEFT moves expert projections from target_modules to target_parameters; what it left there can be trained alone.

    Source: PEFT 0.21.2, convert_peft_config_for_transformers.
    """
    names = modules if isinstance(modules, list) else []
    left = sorted({str(name).rpartition(".")[2] for name in names})
    kept = f"target_modules={left}" if left else "target_modules that name attention projections alone"
    return (
        'PEFT writes this by itself where target_modules is "all-linear" or names projections of experts; '
        f"train with {kept[:200]}"
    )


def _check_task(value: object) -> None:
    if value is not None and (not isinstance(value, str) or value not in _TASKS):
        raise _bad("task_type", f"{quote(value)} is not a task of PEFT's", "save the adapter again with PEFT")


def _check_init(value: object) -> None:
    """Initializations that subtract from the base leave an adapter that is wrong on the base itself."""
    if value is None or isinstance(value, bool):
        return
    name = value.lower() if isinstance(value, str) else ""
    if name.startswith(_MOVING_INITS):
        raise _bad(
            "init_lora_weights",
            f"{quote(value)} moved the base weights, so the adapter is wrong without them",
            "convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    if name not in _UNMOVED_INITS:
        raise _bad("init_lora_weights", f"{quote(value)} is not a known initialization", "train with a known one")


def _rank(key: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_SANE_RANK:
        raise _bad(key, f"{quote(value)} is not a rank", "a rank is a whole number from 1")
    return value


def _number(key: str, value: object) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _bad(key, f"{quote(value)} is not a finite number", "save the adapter with its real alpha")
    return number


def _flag(raw: Mapping[str, object], key: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise _bad(key, f"{quote(value)} is neither true nor false", "save the adapter again with PEFT")
    return bool(value)


def _bias(value: object) -> str:
    if value not in ("none", "all", "lora_only"):
        raise _bad("bias", f"{quote(value)} is none of none, all, lora_only", "save the adapter again with PEFT")
    return str(value)


def _pattern_table(raw: Mapping[str, object], key: str, read: Callable[[str, object], T]) -> dict[str, T]:
    value: Any = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _bad(key, "must map module patterns to numbers", "save the adapter again with PEFT")
    if len(value) > _MAX_PATTERN_KEYS:
        raise _bad(key, f"has more than {_MAX_PATTERN_KEYS} keys", "use patterns that cover more than one module")
    return {pattern: read(f"{key} of {pattern}", number) for pattern, number in value.items()}


def _names(key: str, value: object) -> Names:
    if value is None:
        raise _bad(key, "is missing", "name the modules the adapter was trained on")
    return value if isinstance(value, str) else frozenset(_strings(key, value))


def _strings(key: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _bad(key, "must be a string or a list of strings", "save the adapter again with PEFT")
    return tuple(value)


def _layers(value: object) -> frozenset[int] | None:
    """None when every layer is meant: PEFT reads an empty list so."""
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(type(layer) is int for layer in layers):
        raise _bad("layers_to_transform", "must be layer numbers", "save the adapter again with PEFT")
    return frozenset(layers)


def _bad(key: str, what: str, remedy: str) -> AdapterInvalid:
    shown = key if key in APPLIED or key in REFUSED else quote(key)
    return AdapterInvalid(f"{CONFIG_FILE}: {shown}: {what}", subject=f"{CONFIG_FILE}: {shown}", remedy=remedy)
