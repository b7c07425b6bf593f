"""What any method's adapter may hold besides: modules trained whole, and trained rows of some tokens.

PEFT's `modules_to_save` and `trainable_token_indices`. Follows PEFT 0.21.2, _set_trainable and TrainableTokensWrapper.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from loramux_adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.peft.config import PeftConfig, bad_key
from loramux_adapters.formats.peft.tensors import BASE_WEIGHT
from loramux_adapters.formats.peft.tuner import Shape, Target
from loramux_adapters.formats.refusals import quote
from loramux_adapters.parts.bias import Bias
from loramux_adapters.parts.dense import Dense, WeightChange
from loramux_adapters.parts.norm_weight import NormWeight
from loramux_adapters.parts.part import Part
from loramux_adapters.parts.token_rows import TokenRows
from loramux_adapters.spec import BaseModelSpec, ModuleSpec

_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
_TOKEN_ROWS_BASE = ".token_adapter.base_layer.weight"
# What PEFT calls the heads of tasks that generate no text.
_TASK_HEADS = {"classifier", "score", "qa_outputs"}


@dataclass(frozen=True, eq=False)
class Replace(WeightChange):
    """Another weight altogether."""

    weight: torch.Tensor  # [out, in]

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """See WeightChange."""
        return self.weight.to(weight)


@dataclass(frozen=True)
class WholeTarget(Target):
    """A module that was trained whole."""

    module: ModuleSpec

    @property
    def own_suffixes(self) -> Mapping[str, str]:
        """See Target. With save_embedding_layers PEFT writes the module as it was, and the trained one twice."""
        return {
            "weight": ".weight",
            "again": ".modules_to_save.weight",
            BASE_WEIGHT: ".original_module.weight",
            **({"whole_bias": ".bias"} if self.module.has_bias else {}),
        }

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        out, wide = self.module.out_features, self.module.in_features
        by_kind: dict[str, Shape] = {
            "linear": (out, wide), "conv1d": (wide, out), "embedding": (wide, out), "norm": (out,),
        }  # fmt: skip
        shape = by_kind[self.module.kind]
        shapes = {role: shape for role in ("weight", "again") if role == "weight" or role in found}
        return {**shapes, **({"whole_bias": (out,)} if self.module.has_bias else {})}

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        weight, module = tensors["weight"], self.module
        if not torch.equal(tensors.get("again", weight), weight):
            raise one_table(module.name, f"{module.name}.modules_to_save")
        biases = (Bias(tensors["whole_bias"].float()),) if module.has_bias else ()
        if module.kind == "embedding":
            return (TokenRows(torch.arange(len(weight)), weight),)
        if module.kind == "norm":
            return (NormWeight(weight.float()), *biases)
        whole = weight.T.contiguous() if module.kind == "conv1d" else weight
        return (Dense(Replace(whole), module.out_features, module.in_features), *biases)


@dataclass(frozen=True)
class TokenRowsTarget(Target):
    """An embedding or a head of which the rows of some tokens were trained.

    On a base that ties them PEFT trains the embedding's and uses them in the head as well.
    """

    module: ModuleSpec
    ids: tuple[int, ...]
    suffix: str = _TOKEN_ROWS
    is_copy: bool = False  # of the embedding's: in the file or not

    @property
    def own_suffixes(self) -> Mapping[str, str]:
        """See Target. Of a resized embedding PEFT writes the rows that were not trained as well."""
        return {"token_rows": self.suffix, **({BASE_WEIGHT: _TOKEN_ROWS_BASE} if self.suffix == _TOKEN_ROWS else {})}

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        if self.is_copy and not found:
            return {}
        is_embedding = self.module.kind == "embedding"
        return {"token_rows": (len(self.ids), self.module.out_features if is_embedding else self.module.in_features)}

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        if "token_rows" not in tensors:
            return ()
        order = sorted(range(len(self.ids)), key=lambda index: self.ids[index])
        ids = torch.tensor([self.ids[index] for index in order])
        return (TokenRows(ids, tensors["token_rows"][torch.tensor(order)]),)


@dataclass(frozen=True)
class TiedRowsTarget(TokenRowsTarget):
    """A head that a config does not name and the base ties to the embedding: in the file of a resized one only."""


@dataclass(frozen=True)
class Extras:
    """What a config says of both. `token_rows`: the end of a module's name ("" for the embedding) -> token ids."""

    modules: tuple[str, ...] = ()
    token_rows: Mapping[str, tuple[int, ...]] | None = None

    @classmethod
    def parse(cls, config: PeftConfig) -> Self:
        """Raises AdapterInvalid naming the key."""
        modules = config.strings("modules_to_save")
        if _TASK_HEADS.intersection(modules):
            raise bad_key(
                "modules_to_save",
                "fully trained heads of classifiers are not supported",
                "the head of a classifier generates no text: only adapters without one are served",
            )
        rows = config.raw.get("trainable_token_indices") or None
        if isinstance(rows, dict):
            return cls(modules, {name: _ids(value) for name, value in rows.items()})
        return cls(modules, None if rows is None else {"": _ids(rows)})

    @property
    def token_ids(self) -> Iterable[int]:
        """See ExtraTargets."""
        return [token for ids in (self.token_rows or {}).values() for token in ids]

    def resolve(self, base: BaseModelSpec, adapted: Mapping[str, Target]) -> dict[str, Target]:
        """The modules they are for. Raises AdapterInvalid or AdapterIncompatible.

        `adapted` are those that the method itself is for; none may be both.
        """
        targets: dict[str, Target] = {}
        for wanted in self.modules:
            found = [name for name in base.modules if name.endswith(wanted)]
            if not found:
                raise _absent("modules_to_save", wanted, base)
            targets |= {name: WholeTarget(base.modules[name]) for name in found}
        for wanted, ids in (self.token_rows or {}).items():
            name = _row_module(wanted, base)
            targets[name] = token_rows_target(name, ids, base)
            if name == base.embedding and base.tied_embeddings and base.head is not None and base.head not in adapted:
                targets.setdefault(base.head, TiedRowsTarget(base.modules[base.head], ids, is_copy=True))
        for name in targets:
            if name in adapted:
                raise AdapterInvalid(
                    f"{CONFIG_FILE}: module {quote(name)} is adapted and trained whole or by tokens at once",
                    subject=f"{CONFIG_FILE}: modules_to_save",
                    remedy="train with one of both",
                )
        return targets

    def arithmetic(self, targets: Mapping[str, Target]) -> dict[str, Any]:
        """See Tuner: which tokens the rows are of."""
        return token_ids_of(targets)


NO_EXTRAS = Extras()


def token_rows_target(
    name: str, ids: tuple[int, ...], base: BaseModelSpec, suffix: str = _TOKEN_ROWS, *, is_copy: bool = False
) -> Target:
    """Raises AdapterIncompatible for a token that the base does not have."""
    if not ids or max(ids) >= base.vocab_size or len(set(ids)) != len(ids):
        raise AdapterIncompatible(
            f"{CONFIG_FILE}: the trained tokens of {quote(name)} are not distinct ids below {base.vocab_size}",
            subject=f"{CONFIG_FILE}: trainable_token_indices",
            remedy="upload an adapter made for this base",
        )
    return TokenRowsTarget(base.modules[name], ids, suffix, is_copy)


def token_ids_of(targets: Mapping[str, Target]) -> dict[str, Any]:
    """Which tokens the rows in a file are of, for the digest; empty where there are none."""
    rows = {name: list(target.ids) for name, target in targets.items() if type(target) is TokenRowsTarget}
    return {"token_rows": rows} if rows else {}


def one_table(one: str, other: str) -> AdapterInvalid:
    """The error for two weights that have to be the same and are not."""
    return AdapterInvalid(
        f"{WEIGHTS_FILE}: the weights of {quote(one)} and {quote(other)} are one table, and differ",
        subject=f"{WEIGHTS_FILE}: {quote(one)}",
        remedy="save the adapter again with PEFT",
    )


def tie_token_rows(modules: dict[str, tuple[Part, ...]], base: BaseModelSpec) -> None:
    """Gives the head the embedding's trained rows, where the base ties both. Raises AdapterInvalid if it has others."""
    if not base.tied_embeddings or base.embedding is None or base.head is None:
        return
    rows = [part for part in modules.get(base.embedding, ()) if isinstance(part, TokenRows)]
    if not rows or len(rows[0].ids) == base.vocab_size:
        return
    copies = [part for part in modules.get(base.head, ()) if isinstance(part, TokenRows)]
    if not copies:
        modules[base.head] = (*modules.get(base.head, ()), *rows)
    elif not (torch.equal(copies[0].ids, rows[0].ids) and torch.equal(copies[0].rows, rows[0].rows)):
        raise AdapterInvalid(
            f"{WEIGHTS_FILE}: the trained tokens of {quote(base.head)} are not those of {quote(base.embedding)}, which "
            "the base ties to it",
            subject=f"{WEIGHTS_FILE}: {quote(base.head)}",
            remedy="save the adapter again with PEFT",
        )


def _row_module(wanted: str, base: BaseModelSpec) -> str:
    ends = [name for name in (base.embedding, base.head) if name is not None]
    name = base.embedding if not wanted else next((name for name in ends if name.endswith(wanted)), None)
    if name is None:
        raise _absent("trainable_token_indices", wanted, base)
    return name


def _absent(key: str, wanted: str, base: BaseModelSpec) -> AdapterIncompatible:
    return AdapterIncompatible(
        f"{CONFIG_FILE}: {key}: {base.architecture} base {quote(base.model_id)} has no module {quote(wanted)}",
        subject=f"{CONFIG_FILE}: {key}",
        remedy="upload an adapter made for this base",
    )


def _ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
        raise bad_key("trainable_token_indices", "must be lists of token ids", "save the adapter again with PEFT")
    return tuple(value)
