"""Which modules of the base an adapter adapts, with which rank and scale: PEFT's own matching, on names alone.

Follows PEFT 0.21.2: check_target_module_exists, _maybe_include_all_linear_layers, get_pattern_key and
_add_targets_to_tie. Torch-free; knows no tensor: what the config selects is compared with the file elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.name_keys import NameKeys
from loramux_adapters.formats.patterns import RegexBudget, SafePattern
from loramux_adapters.formats.peft_config import Names, PeftLoraConfig
from loramux_adapters.formats.refusals import quote
from loramux_adapters.spec import BaseModelSpec

_ALL_LINEAR = "all-linear"
_ADAPTABLE = ("linear", "conv1d", "embedding")
# The names PEFT takes for embeddings when it decides about weight tying, whatever the model calls its own.
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")

Predicate = Callable[[str], bool]


@dataclass(frozen=True)
class Target:
    """How one module is adapted: `scale` is the factor on B A."""

    rank: int
    scale: float


@dataclass(frozen=True)
class Targets:
    """The adapted modules by name. `tied_head` is the head whose adapter is the embedding's own, transposed."""

    modules: Mapping[str, Target]
    tied_head: str | None


def resolve_targets(config: PeftLoraConfig, base: BaseModelSpec, limits: ReadLimits) -> Targets:
    """What `config` selects of `base`.

    Raises AdapterInvalid for an unsafe pattern or a target that cannot be adapted, AdapterIncompatible when nothing
    of this base is selected. Takes at most `limits.regex_seconds` of processor time.
    """
    budget = RegexBudget(limits)
    rank_keys = NameKeys(config.rank_pattern, f"{CONFIG_FILE}: rank_pattern", budget)
    alpha_keys = NameKeys(config.alpha_pattern, f"{CONFIG_FILE}: alpha_pattern", budget)
    head = _tied_head(config, base, budget)
    targets = {}
    for name in _selected(config, base, head, budget):
        rank_key, alpha_key = rank_keys.find(name), alpha_keys.find(name)
        rank = config.r if rank_key is None else config.rank_pattern[rank_key]
        alpha = config.alpha if alpha_key is None else config.alpha_pattern[alpha_key]
        targets[name] = Target(rank, config.scale(rank, alpha))
    return Targets(targets, head)


def _tied_head(config: PeftLoraConfig, base: BaseModelSpec, budget: RegexBudget) -> str | None:
    """The head, when PEFT ties its adapter to the embedding's: ensure_weight_tying on a tied base."""
    if not (config.ensure_weight_tying and base.tied_embeddings and base.embedding and base.head):
        return None
    if isinstance(config.target_modules, str):
        pattern = _pattern(config.target_modules, "target_modules", budget)
        wanted = any(pattern.fullmatch(name) for name in _EMBEDDING_NAMES)
    else:
        wanted = any(name.rpartition(".")[2] in _EMBEDDING_NAMES for name in config.target_modules)
    return base.head if wanted else None


def _selected(config: PeftLoraConfig, base: BaseModelSpec, head: str | None, budget: RegexBudget) -> list[str]:
    is_target = _target_predicate(config, base, head, budget)
    is_excluded = _exclusion_predicate(config.exclude_modules, budget)
    # PEFT ties the head before it looks at exclude_modules
    selected = [name for name in base.modules if name == head or (not is_excluded(name) and is_target(name))]
    for name in selected:
        if base.modules[name].kind not in _ADAPTABLE:
            raise AdapterInvalid(
                f"{CONFIG_FILE}: target_modules selects {quote(name)}, which cannot have a low-rank adapter",
                subject=f"{CONFIG_FILE}: target_modules",
                remedy="target linear layers, the embedding or the head",
            )
    if head and base.embedding not in selected:
        raise AdapterInvalid(
            f"{CONFIG_FILE}: ensure_weight_tying needs the embedding, which exclude_modules leaves out",
            subject=f"{CONFIG_FILE}: ensure_weight_tying",
            remedy="exclude both or neither",
        )
    if not selected:
        raise AdapterIncompatible(
            f"{CONFIG_FILE}: target_modules selects no module of {base.architecture} base {quote(base.model_id)}",
            subject=f"{CONFIG_FILE}: target_modules",
            remedy="upload an adapter made for this base",
        )
    return selected


def _target_predicate(config: PeftLoraConfig, base: BaseModelSpec, head: str | None, budget: RegexBudget) -> Predicate:
    targets = config.target_modules
    if isinstance(targets, str):
        if targets.lower() == _ALL_LINEAR:
            return lambda name: base.modules[name].kind in ("linear", "conv1d") and name != base.head
        if head and base.embedding:
            targets = rf"(?:{targets}|^{re.escape(base.embedding)}$)"
        return _pattern(targets, "target_modules", budget).fullmatch
    if head and base.embedding:
        targets |= {base.embedding}
    exact_or_suffix = targets
    in_layers = _layer_predicate(config, budget)
    # A full name is taken whatever its layer; only what a suffix found is asked for its layer.
    return lambda name: name in exact_or_suffix or (_has_suffix(name, exact_or_suffix) and in_layers(name))


def _exclusion_predicate(excluded: Names, budget: RegexBudget) -> Predicate:
    if isinstance(excluded, str):
        return _pattern(excluded, "exclude_modules", budget).fullmatch
    return lambda name: name in excluded or _has_suffix(name, excluded)


def _layer_predicate(config: PeftLoraConfig, budget: RegexBudget) -> Predicate:
    wanted = config.layers_to_transform
    if wanted is None:
        return lambda name: True
    if not config.layers_pattern:

        def index_of(name: str) -> str | None:
            found = _ANY_LAYER.match(name)
            return found["idx"] if found else None

    else:
        patterns = [
            _pattern(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", "layers_pattern", budget)
            for pattern in config.layers_pattern
        ]

        def index_of(name: str) -> str | None:
            return next((index for pattern in patterns if (index := pattern.match(name, "idx")) is not None), None)

    def in_layers(name: str) -> bool:
        index = index_of(name)
        return index is not None and int(index) in wanted

    return in_layers


def _has_suffix(name: str, suffixes: frozenset[str]) -> bool:
    """Whether `name` ends with a dot and one of `suffixes`."""
    parts = name.split(".")
    return any(".".join(parts[start:]) in suffixes for start in range(1, len(parts)))


def _pattern(pattern: str, key: str, budget: RegexBudget) -> SafePattern:
    return SafePattern(pattern, f"{CONFIG_FILE}: {key}", budget)
