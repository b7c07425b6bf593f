"""Which modules of the base an adapter adapts: PEFT's own matching, on names alone.

Follows PEFT 0.21.2: check_target_module_exists, _maybe_include_all_linear_layers, get_pattern_key and
_add_targets_to_tie. Torch-free; knows no tensor: what the config selects is compared with the file elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.patterns import RegexBudget, SafePattern
from loramux_adapters.formats.peft.config import Names, PeftConfig, bad_key
from loramux_adapters.formats.refusals import quote
from loramux_adapters.spec import BaseModelSpec, ModuleKind

LINEAR: tuple[ModuleKind, ...] = ("linear", "conv1d")
LINEAR_AND_EMBEDDING: tuple[ModuleKind, ...] = (*LINEAR, "embedding")

_ALL_LINEAR = "all-linear"
# The names PEFT takes for embeddings when it decides about weight tying, whatever the model calls its own.
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")

Predicate = Callable[[str], bool]


@dataclass(frozen=True)
class Selection:
    """What a config says of the modules it is for. A str in a names field is a regular expression."""

    target_modules: Names
    exclude_modules: Names = frozenset()
    layers_to_transform: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    ensure_weight_tying: bool = False

    @classmethod
    def parse(cls, config: PeftConfig) -> Selection:
        """Raises AdapterInvalid naming the key."""
        selection = cls(
            target_modules=config.names("target_modules", is_needed=True),
            exclude_modules=config.names("exclude_modules"),
            layers_to_transform=config.layers("layers_to_transform"),
            layers_pattern=config.strings("layers_pattern"),
            ensure_weight_tying=config.flag("ensure_weight_tying"),
        )
        has_layers = config.raw.get("layers_to_transform") is not None
        if isinstance(selection.target_modules, str) and has_layers:
            raise bad_key("layers_to_transform", "cannot go with a target_modules pattern", "list the modules")
        if selection.layers_pattern and not has_layers:
            raise bad_key("layers_pattern", "needs layers_to_transform", "give both or neither")
        return selection


@dataclass(frozen=True)
class Selected:
    """The selected modules in model order. `tied_head` is the head whose adapter is the embedding's own, transposed."""

    names: tuple[str, ...]
    tied_head: str | None


def select_modules(
    selection: Selection, base: BaseModelSpec, budget: RegexBudget, adaptable: Collection[ModuleKind]
) -> Selected:
    """What `selection` takes of `base`.

    Raises AdapterInvalid for an unsafe pattern or a module of a kind that is not in `adaptable`, AdapterIncompatible
    when nothing of this base is selected. Takes processor time of the budget at most.
    """
    head = _tied_head(selection, base, budget)
    return Selected(tuple(_selected(selection, base, head, budget, adaptable)), head)


def _tied_head(selection: Selection, base: BaseModelSpec, budget: RegexBudget) -> str | None:
    """The head, when PEFT ties its adapter to the embedding's: ensure_weight_tying on a tied base."""
    if not (selection.ensure_weight_tying and base.tied_embeddings and base.embedding and base.head):
        return None
    if isinstance(selection.target_modules, str):
        pattern = _pattern(selection.target_modules, "target_modules", budget)
        wanted = any(pattern.fullmatch(name) for name in _EMBEDDING_NAMES)
    else:
        wanted = any(name.rpartition(".")[2] in _EMBEDDING_NAMES for name in selection.target_modules)
    return base.head if wanted else None


def _selected(
    selection: Selection, base: BaseModelSpec, head: str | None, budget: RegexBudget, adaptable: Collection[ModuleKind]
) -> list[str]:
    is_target = _target_predicate(selection, base, head, budget)
    is_excluded = _exclusion_predicate(selection.exclude_modules, budget)
    # PEFT ties the head before it looks at exclude_modules
    selected = [name for name in base.modules if name == head or (not is_excluded(name) and is_target(name))]
    for name in selected:
        if base.modules[name].kind not in adaptable:
            raise AdapterInvalid(
                f"{CONFIG_FILE}: target_modules selects {quote(name)}, which cannot have an adapter of this kind",
                subject=f"{CONFIG_FILE}: target_modules",
                remedy=f"target modules of these kinds: {', '.join(sorted(adaptable))}",
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


def _target_predicate(selection: Selection, base: BaseModelSpec, head: str | None, budget: RegexBudget) -> Predicate:
    targets = selection.target_modules
    if isinstance(targets, str):
        if targets.lower() == _ALL_LINEAR:
            return lambda name: base.modules[name].kind in ("linear", "conv1d") and name != base.head
        if head and base.embedding:
            targets = rf"(?:{targets}|^{re.escape(base.embedding)}$)"
        return _pattern(targets, "target_modules", budget).fullmatch
    if head and base.embedding:
        targets |= {base.embedding}
    exact_or_suffix = targets
    in_layers = _layer_predicate(selection, budget)
    # A full name is taken whatever its layer; only what a suffix found is asked for its layer.
    return lambda name: name in exact_or_suffix or (_has_suffix(name, exact_or_suffix) and in_layers(name))


def _exclusion_predicate(excluded: Names, budget: RegexBudget) -> Predicate:
    if isinstance(excluded, str):
        return _pattern(excluded, "exclude_modules", budget).fullmatch
    return lambda name: name in excluded or _has_suffix(name, excluded)


def _layer_predicate(selection: Selection, budget: RegexBudget) -> Predicate:
    wanted = selection.layers_to_transform
    if wanted is None:
        return lambda name: True
    if not selection.layers_pattern:

        def index_of(name: str) -> str | None:
            found = _ANY_LAYER.match(name)
            return found["idx"] if found else None

    else:
        patterns = [
            _pattern(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", "layers_pattern", budget)
            for pattern in selection.layers_pattern
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
