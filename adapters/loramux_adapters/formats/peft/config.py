"""adapter_config.json as PEFT writes it: every key is applied, refused, or changes no number.

A key in none of a method's lists passes only when it is null, false or empty, so that an option of a later PEFT is
refused rather than left out in silence. Torch-free; knows no base, no tensor and no method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.formats.refusals import quote

SELECTION_KEYS = frozenset({"exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"})
"""Which modules an adapter is on: the same keys in every method that adapts modules."""

_COMMON_APPLIED = frozenset({"bias", "peft_type", "task_type"})
_MODULES_TO_SAVE = frozenset({"modules_to_save"})

_COMMON_IGNORABLE = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"}
)

# PEFT computes the same deltas for all of them; what a task adds (a classifier's head) is refused for itself.
_TASKS = {"CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS"}
# A number no model has: above it, r is nonsense rather than a rank over this server's limit.
_MAX_SANE_RANK = 65_536
# Far more than any template's turn has.
_MAX_IDS = 1_024
# More than any base has modules.
_MAX_PATTERN_KEYS = 8_192

Names = str | frozenset[str]
"""Of modules; a str is a regular expression, as in PEFT."""

T = TypeVar("T")


@dataclass(frozen=True)
class ConfigKeys:
    """What each key of one method's config means to us; the keys that all methods have are added.

    `refused` are options that change the arithmetic and are not read: key -> what the message calls them.
    """

    applied: frozenset[str]
    refused: Mapping[str, str] = field(default_factory=dict)
    ignorable: frozenset[str] = frozenset()
    extras: frozenset[str] = _MODULES_TO_SAVE  # see `extras`: what the file may hold besides

    @property
    def all_applied(self) -> frozenset[str]:
        """With the common ones."""
        return self.applied | _COMMON_APPLIED | self.extras

    @property
    def all_ignorable(self) -> frozenset[str]:
        """With the common ones."""
        return self.ignorable | _COMMON_IGNORABLE

    def check(self, raw: Mapping[str, object]) -> None:
        """Raises AdapterInvalid for the first key that is refused, or unknown and not empty."""
        for key, value in raw.items():
            if key in self.all_applied or key in self.all_ignorable:
                continue
            if value is None or value is False or value in ("", [], {}):
                continue
            if key not in self.refused:
                raise bad_key(quote(key), "is not a known option", "remove it if it changes nothing")
            raise bad_key(key, f"{self.refused[key]} are not supported", _remedy(key, value, raw))


class PeftConfig:
    """One config whose keys were checked. Its methods read a value, and raise AdapterInvalid naming the key."""

    def __init__(self, raw: Mapping[str, object], keys: ConfigKeys, peft_type: str) -> None:
        """Raises AdapterInvalid, see ConfigKeys.check, and for a config of another method."""
        if raw.get("peft_type") != peft_type:
            raise bad_key("peft_type", f"{quote(raw.get('peft_type'))} is not {peft_type}", _SAVE_AGAIN)
        keys.check(raw)
        self.raw = raw
        self._check_task()

    def rank(self, key: str, default: int | None = None) -> int:
        """A whole number from 1."""
        return _rank(key, self.raw.get(key, default))

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number from 0."""
        value = self.raw.get(key, default)
        return 0 if value == 0 and type(value) is int else _rank(key, value)

    def amount(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 that may be large."""
        return _amount(key, self.raw.get(key, default))

    def seed(self, key: str, default: int | None = None) -> int:
        """A whole number of 64 bits."""
        value = self.raw.get(key, default)
        if type(value) is not int or not -(1 << 63) <= value < 1 << 64:
            raise bad_key(key, f"{quote(value)} is not a seed", _SAVE_AGAIN)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        return _number(key, self.raw.get(key, default))

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; null is the default."""
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise bad_key(key, f"{quote(value)} is neither true nor false", _SAVE_AGAIN)
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        """One of several words."""
        value = self.raw.get(key, default)
        if value not in choices:
            raise bad_key(key, f"{quote(value)} is none of {', '.join(choices)}", _SAVE_AGAIN)
        return str(value)

    def ranks(self, key: str) -> dict[str, int]:
        """Patterns of module names -> ranks, in the order of the file, which decides between matching keys."""
        return self._table(key, _rank)

    def amounts(self, key: str) -> dict[str, int]:
        """Patterns of module names -> whole numbers that may be large, in the order of the file."""
        return self._table(key, _amount)

    def numbers(self, key: str) -> dict[str, float]:
        """Patterns of module names -> numbers, in the order of the file."""
        return self._table(key, _number)

    def names(self, key: str, *, is_needed: bool = False) -> Names:
        """Names of modules, or a pattern of them."""
        value = self.raw.get(key)
        if value is None and is_needed:
            raise bad_key(key, "is missing", "name the modules the adapter was trained on")
        return value if isinstance(value, str) and value else frozenset(self.strings(key))

    def strings(self, key: str) -> tuple[str, ...]:
        """A string or a list of strings."""
        value = self.raw.get(key) or []
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise bad_key(key, "must be a string or a list of strings", _SAVE_AGAIN)
        return tuple(value)

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids."""
        value = self.raw.get(key) or []
        if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
            raise bad_key(key, "must be a list of token ids", _SAVE_AGAIN)
        if len(value) > _MAX_IDS:
            raise bad_key(key, f"has more than {_MAX_IDS} ids", "train with a shorter sequence")
        return tuple(value)

    def layers(self, key: str) -> frozenset[int] | None:
        """Layer numbers; None when every layer is meant: PEFT reads an empty list so."""
        value = self.raw.get(key)
        if value is None or value == []:
            return None
        layers = value if isinstance(value, list) else [value]
        if not all(type(layer) is int for layer in layers):
            raise bad_key(key, "must be layer numbers", _SAVE_AGAIN)
        return frozenset(layers)

    def _table(self, key: str, read: Callable[[str, object], T]) -> dict[str, T]:
        value: Any = self.raw.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise bad_key(key, "must map module patterns to numbers", _SAVE_AGAIN)
        if len(value) > _MAX_PATTERN_KEYS:
            raise bad_key(
                key, f"has more than {_MAX_PATTERN_KEYS} keys", "use patterns that cover more than one module"
            )
        return {pattern: read(quote(f"{key} of {pattern}"), number) for pattern, number in value.items()}

    def _check_task(self) -> None:
        value = self.raw.get("task_type")
        if value is not None and (not isinstance(value, str) or value not in _TASKS):
            raise bad_key("task_type", f"{quote(value)} is not a task of PEFT's", "save the adapter again with PEFT")


_SAVE_AGAIN = "save the adapter again with PEFT"


def bad_key(key: str, what: str, remedy: str) -> AdapterInvalid:
    """The refusal of one key; a stranger's key is quoted by the caller."""
    return AdapterInvalid(f"{CONFIG_FILE}: {key}: {what}", subject=f"{CONFIG_FILE}: {key}", remedy=remedy)


def _rank(key: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_SANE_RANK:
        raise bad_key(key, f"{quote(value)} is not a rank", "a rank is a whole number from 1")
    return value


def _amount(key: str, value: object) -> int:
    if type(value) is not int or not 1 <= value < 1 << 48:
        raise bad_key(key, f"{quote(value)} is not a whole number from 1", _SAVE_AGAIN)
    return value


def _number(key: str, value: object) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise bad_key(key, f"{quote(value)} is not a finite number", "save the adapter with its real alpha")
    return number


def _remedy(key: str, value: object, raw: Mapping[str, object]) -> str:
    if key == "target_parameters":
        return _remedy_for_experts(raw.get("target_modules"))
    return "train without it"


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
