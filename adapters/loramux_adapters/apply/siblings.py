"""The base's linear maps as groups over one frozen product: siblings that read the same input are stacked.

Shared by the server, which puts slots of adapters beside each group, and by the trainer. Knows no adapter.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from loramux_adapters.base.frozen import FrozenLinear, Nf4Linear, freeze
from loramux_adapters.base.load import LoadedBase
from loramux_adapters.base.weight_formats import WeightFormats
from loramux_adapters.spec import BaseModelSpec, ModuleSpec

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections of one parent that Hugging Face models call with the same input. Elsewhere each stands alone, which is
only slower: a group checks the identity of its input at every call."""


@dataclass(frozen=True, eq=False)
class FrozenGroup:
    """Linear maps that share one frozen product; `columns` are each one's [from, to) in its output."""

    names: tuple[str, ...]
    columns: tuple[tuple[int, int], ...]
    frozen: FrozenLinear

    def weight(self, member: int) -> torch.Tensor:
        """The frozen weight [out, in] of one map in float32; a new tensor."""
        return self.frozen.dequantize(torch.float32, self.columns[member])


def linear_specs(spec: BaseModelSpec) -> list[ModuleSpec]:
    """The linear maps of a base, in model order."""
    return [module for module in spec.modules.values() if module.kind in ("linear", "conv1d")]


def frozen_groups(base: LoadedBase, weight_formats: WeightFormats, *, stack: bool = True) -> Iterator[FrozenGroup]:
    """Every linear map of `base` once, in model order, its frozen product built in `weight_formats`.

    `stack` joins siblings whose weights stack exactly: bitwise the same products, in fewer calls.
    """
    for names in _grouped_names(base.spec, stack):
        for part in _stackable(base, names):
            yield _make_group(base, part, weight_formats)


def _grouped_names(spec: BaseModelSpec, stack: bool) -> list[tuple[str, ...]]:
    """Linear modules in model order, siblings together."""
    groups: dict[tuple[str, int] | str, list[str]] = {}
    for module in linear_specs(spec):
        parent, _, leaf = module.name.rpartition(".")
        family = next((index for index, leaves in enumerate(SIBLINGS) if leaf in leaves), None)
        key = module.name if family is None or not stack else (parent, family)
        groups.setdefault(key, []).append(module.name)
    return [tuple(names) for names in groups.values()]


def _stackable(base: LoadedBase, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """`names` as one part when their weights stack exactly, else one by one."""
    if len(names) == 1:
        return [names]
    frozen = [freeze(base.model.get_submodule(name), base.compute_dtype, WeightFormats()) for name in names]
    first = frozen[0]
    if isinstance(first, Nf4Linear) and all(isinstance(f, Nf4Linear) and first.stackable_with(f) for f in frozen):
        return [names]
    return [(name,) for name in names]


def _make_group(base: LoadedBase, names: tuple[str, ...], weight_formats: WeightFormats) -> FrozenGroup:
    parts = [freeze(base.model.get_submodule(name), base.compute_dtype, weight_formats) for name in names]
    frozen = parts[0] if len(parts) == 1 else Nf4Linear.stack([part for part in parts if isinstance(part, Nf4Linear)])
    if isinstance(frozen, Nf4Linear):
        frozen.build(weight_formats)
    ends = list(itertools.accumulate(base.spec.modules[name].out_features for name in names))
    return FrozenGroup(names, tuple(zip([0, *ends[:-1]], ends, strict=True)), frozen)
