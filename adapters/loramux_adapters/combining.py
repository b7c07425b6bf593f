"""Several adapters as one: low ranks, biases and bottlenecks add, gains multiply, other changes of weights are summed.

    W' = output_gain * (W + sum of w_i * (W_i - W)) * input_gain

for each linear map: W_i is what the adapter i alone makes of the frozen W with everything but its gains, and the gains
are the products of 1 + w_i * (gain_i - 1). This is exact or refused; nothing is approximated or dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import torch

from loramux_adapters.combination import Term, combine_specs
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.parts.dense import Dense, WeightChange
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.part import Kind, Part, Share
from loramux_adapters.parts.registry import KIND_OF, KINDS, fold_parts
from loramux_adapters.spec import BaseModelSpec, ModuleSpec
from loramux_adapters.weights import AdapterWeights, ModuleWeights

MOST_SUMMED: Final = 4
"""Adapters at one module whose effect there is no low rank: each makes a weight anew while a step waits."""

Contribution = tuple[tuple[Part, ...], float]
"""What one adapter does to a module, and its weight."""


def combine(terms: Sequence[tuple[AdapterWeights, float]], base: BaseModelSpec) -> AdapterWeights:
    """The adapter that several adapters with weights come to on `base`.

    Raises AdapterIncompatible, with the module, where there is none that is exact.
    """
    _, spec = combine_specs([Term(weights.spec, weight) for weights, weight in terms])
    # In one order, whatever the caller's: what is equal has equal bits.
    terms = sorted(terms, key=lambda term: term[0].spec.digest)
    names = sorted({name for weights, _ in terms for name in weights.modules})
    modules = {}
    for name in names:
        shares = [(weights.modules[name].parts, weight) for weights, weight in terms if name in weights.modules]
        if name == base.embedding and spec.vocabulary:
            _check_rows(name, shares)
        modules[name] = ModuleWeights(_combine_module(name, shares, base))
    ranks = {name: part.rank for name, module in modules.items() if (part := module.get(LowRank)) is not None}
    others = (spec.others | spec.ranks.keys()) - ranks.keys()
    return AdapterWeights(replace(spec, ranks=ranks, others=others), modules)


def _check_rows(name: str, contributions: Sequence[Contribution]) -> None:
    """Beside an adapter with a vocabulary of its own no other may change rows of the embedding: it has others."""
    if len(_acting(contributions)) > 1:
        raise AdapterIncompatible(
            f"{name}: one of the adapters has a vocabulary of its own, and another changes rows of the base's",
            subject=name,
            remedy="name the one with its vocabulary beside adapters that leave the embedding alone",
        )


def _acting(contributions: Sequence[Contribution]) -> list[float]:
    """The weights of those that act on the prompt's own tokens."""
    return [weight for parts, weight in contributions if any(not KIND_OF[type(p)].for_virtual_ids for p in parts)]


def _combine_module(name: str, contributions: Sequence[Contribution], base: BaseModelSpec) -> tuple[Part, ...]:
    if len(contributions) == 1 and contributions[0][1] == 1.0:
        return contributions[0][0]
    by_kind = _by_kind(contributions)
    parts = _combine_weights(name, by_kind, contributions, base)
    for kind in by_kind:
        if not kind.in_weight:
            parts[kind] = _combine_kind(name, kind, by_kind[kind])
    return tuple(parts[kind] for kind in KINDS if kind in parts)


def _combine_weights(
    name: str,
    by_kind: Mapping[Kind, Sequence[Share[Any]]],
    contributions: Sequence[Contribution],
    base: BaseModelSpec,
) -> dict[Kind, Part]:
    """What is in the module's weight: kind by kind where each has a sum, else as it is where one adapter alone acts,
    whole, else as a weight of its own.
    """
    parts: dict[Kind, Part] = {}
    without_sum: Kind | None = None
    for kind in (kind for kind in by_kind if kind.in_weight):
        summed = kind.combine(by_kind[kind])
        if summed is None:
            without_sum = kind
        else:
            parts[kind] = summed
    if without_sum is None:
        return parts
    if _acting(contributions) == [1.0]:
        return {kind: by_kind[kind][0].part for kind in by_kind if kind.in_weight}
    if base.modules[name].kind not in ("linear", "conv1d"):
        raise _no_sum(name, without_sum)
    return {KIND_OF[Dense]: _sum_weights(base.modules[name], contributions)}


def _by_kind(contributions: Sequence[Contribution]) -> Mapping[Kind, list[Share[Any]]]:
    found: dict[Kind, list[Share[Any]]] = {}
    for parts, weight in contributions:
        for part in parts:
            found.setdefault(KIND_OF[type(part)], []).append(Share(part, weight))
    return found


def _combine_kind(name: str, kind: Kind, shares: Sequence[Share[Any]]) -> Part:
    part = shares[0].part if len(shares) == 1 and shares[0].weight == 1.0 else kind.combine(shares)
    if part is None:
        raise _no_sum(name, kind)
    return part


def _sum_weights(module: ModuleSpec, contributions: Sequence[Contribution]) -> Dense:
    """The parts of a linear map that are in its weight, as a weight of its own."""
    changing = ((tuple(p for p in parts if KIND_OF[type(p)].in_weight), weight) for parts, weight in contributions)
    shares = tuple((parts, weight) for parts, weight in changing if parts)
    costly = sum(any(not isinstance(part, LowRank) for part in parts) for parts, _ in shares)
    if costly > MOST_SUMMED:
        raise AdapterIncompatible(
            f"{module.name}: {costly} of the adapters make a weight of their own there, and {MOST_SUMMED} may",
            subject=module.name,
            remedy="name fewer of them; low ranks may be more",
        )
    return Dense(SummedWeights(_join_low_ranks(shares)), module.out_features, module.in_features)


def _join_low_ranks(shares: tuple[Contribution, ...]) -> tuple[Contribution, ...]:
    """The same with those that are a low rank alone as one: each share takes the module's whole weight anew."""
    alone = [share for share in shares if len(share[0]) == 1 and isinstance(share[0][0], LowRank)]
    joined = KIND_OF[LowRank].combine([Share(parts[0], weight) for parts, weight in alone]) if alone else None
    if joined is None:
        return shares
    return (*(share for share in shares if share not in alone), ((joined,), 1.0))


@dataclass(frozen=True, eq=False)
class SummedWeights(WeightChange):
    """W + sum of w_i * (W_i - W), where the parts of the adapter i make W_i of W."""

    shares: tuple[Contribution, ...]

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """See WeightChange."""
        total, unused = weight.clone(), torch.zeros(len(weight), device=weight.device)
        for parts, share in self.shares:
            own = weight.clone()
            fold_parts(own, unused, parts)
            total += (own - weight).mul_(share)
        return total

    def bias(self, bias: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
        """See WeightChange: what the dense parts among them make of it."""
        total = bias
        for parts, share in self.shares:
            for part in parts:
                own = part.change.bias(bias, weight) if isinstance(part, Dense) else bias
                if own is not bias and own is not None:
                    change = own if bias is None else own - bias
                    total = share * change if total is None else total + share * change
        return total

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those of all parts, in order."""
        return tuple(_walk(self.shares))

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> SummedWeights:
        """See WeightChange."""
        given = iter(tensors)
        return SummedWeights(_rebuild(self.shares, lambda: next(given)))


def _walk(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    for inner in _inner(value):
        yield from _walk(inner)


def _rebuild(value: Any, take: Callable[[], torch.Tensor]) -> Any:
    """`value` with what `take` gives in place of each tensor, in the order of `_walk`."""
    if isinstance(value, torch.Tensor):
        return take()
    if isinstance(value, tuple):
        return tuple(_rebuild(inner, take) for inner in value)
    if isinstance(value, Part | WeightChange):
        return replace(value, **{field.name: _rebuild(getattr(value, field.name), take) for field in fields(value)})
    return value


def _inner(value: object) -> Iterator[object]:
    if isinstance(value, tuple):
        yield from value
    elif isinstance(value, Part | WeightChange):
        yield from (getattr(value, field.name) for field in fields(value))


def _no_sum(name: str, kind: Kind) -> AdapterIncompatible:
    return AdapterIncompatible(
        f"{name}: {kind.part.__name__} of one adapter has no exact sum with what the others do there",
        subject=name,
        remedy="name adapters that do not meet there, or with the weight 1 only one of them",
    )
