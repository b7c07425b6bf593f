"""Puts adapted modules into a loaded base, in place: every Linear, Linear4bit, Conv1D, embedding and norm.

Afterwards the model's projections read the step's batch from one cell. Knows no slots' owners and no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from loramux_adapters.apply.batch import StepCell
from loramux_adapters.apply.group import (
    AdaptedAttention,
    AdaptedEmbedding,
    AdaptedHead,
    AdaptedLinear,
    AdaptedNorm,
    AdaptedSublayer,
    PartsAtSite,
    SiteGroup,
    SublayerProjection,
)
from loramux_adapters.apply.siblings import FrozenGroup, frozen_groups, linear_specs
from loramux_adapters.base.fingerprint import QuantizedModule, fingerprint, fingerprinting
from loramux_adapters.base.frozen import DenseLinear, Nf4Linear
from loramux_adapters.base.load import LoadedBase
from loramux_adapters.base.weight_formats import WeightFormats
from loramux_adapters.parts.part import Kind
from loramux_adapters.parts.rank_rows import RankRowsTable
from loramux_adapters.parts.site import MakeProduct, Normalize, Site, SiteKind
from loramux_adapters.spec import BaseModelSpec, ModuleSpec
from loramux_adapters.sublayers import sublayers


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """The injected model and its places for adapters, by module name."""

    model: PreTrainedModel
    base: LoadedBase
    cell: StepCell
    groups: tuple[SiteGroup, ...]
    linears: dict[str, tuple[SiteGroup, int]]
    sites: dict[str, tuple[PartsAtSite, int]]  # every place where parts act, also those that are no module
    attention: tuple[AdaptedAttention, ...]  # by layer; none where layers differ
    sublayers: tuple[AdaptedSublayer, ...]  # none where the architecture's are not known
    slot_kinds: dict[int, frozenset[Kind]]  # which kinds of parts the adapter of a slot has
    slot_vocabularies: dict[int, int]  # of adapters that have another than the base
    capacity: int  # rank rows per linear module
    weight_formats: WeightFormats  # of the frozen weights

    @property
    def spec(self) -> BaseModelSpec:
        """Facts of the base."""
        return self.base.spec

    def vocabulary(self, slot: int) -> int:
        """How many logits of a row of this slot mean something."""
        return self.slot_vocabularies.get(slot, self.spec.vocab_size)

    def reset(self) -> None:
        """Drops activations that a failed forward left behind."""
        for group in self.groups:
            group.reset()
        for sublayer in self.sublayers:
            sublayer.reset()

    def refingerprint(self) -> str:
        """The base's fingerprint recomputed from the content that serves now; equals `spec.fingerprint` for ever."""
        return fingerprint(self._quantized(), self.spec.parameters, self.base.config_json)

    def refingerprinting(self) -> Generator[None, None, str]:
        """`refingerprint` module by module; steps may run in between."""
        return fingerprinting(self._quantized(), self.spec.parameters, self.base.config_json)

    def _quantized(self) -> Iterator[tuple[str, QuantizedModule]]:
        for name, (group, member) in self.linears.items():
            if isinstance(group.frozen, Nf4Linear):
                begin, end = group.columns[member]
                frozen = group.frozen
                blocks = frozen.in_features * (end - begin) // frozen.block_size
                first = frozen.in_features * begin // frozen.block_size
                absmax = frozen.absmax if len(group.members) == 1 else frozen.absmax[first : first + blocks]
                yield name, QuantizedModule(frozen.codes[begin:end], absmax, frozen.block_size)


def rank_row_bytes(spec: BaseModelSpec, dtype: torch.dtype) -> int:
    """Device bytes of one rank row in every linear module: what one unit of rank costs an adapter on all of them."""
    return sum(module.in_features + module.out_features for module in linear_specs(spec)) * dtype.itemsize


def inject(
    base: LoadedBase, *, capacity: int, weight_formats: WeightFormats = WeightFormats(), stack: bool = True
) -> AdaptedModel:
    """Replaces the adaptable modules of `base.model`; `capacity` rank rows per linear module.

    `stack` fuses siblings into one frozen product, which is bitwise the same and saves calls.
    """
    cell, rank_rows = StepCell(), RankRowsTable(capacity, base.device)
    groups: list[SiteGroup] = []
    linears: dict[str, tuple[SiteGroup, int]] = {}
    sites: dict[str, tuple[PartsAtSite, int]] = {}
    for frozen in frozen_groups(base, weight_formats, stack=stack):
        group = _make_group(base, frozen, cell, rank_rows, weight_formats)
        groups.append(group)
        for member, name in enumerate(frozen.names):
            linears[name], sites[name] = (group, member), (group.parts, member)
            is_head = name == base.spec.head
            linear = AdaptedHead(group, member, cell) if is_head else AdaptedLinear(group, member)
            _replace(base.model, name, linear)
    for name, spec in base.spec.modules.items():
        module = base.model.get_submodule(name)
        adapted: AdaptedEmbedding | AdaptedNorm
        if spec.kind == "embedding" and isinstance(module, nn.Embedding):
            scale = getattr(module, "embed_scale", None)
            site = replace(_site(base, spec, rank_rows, None, scale), weight=_table_of(module))
            adapted = AdaptedEmbedding(module, site, cell)
        elif spec.kind == "norm" and getattr(module, "weight", None) is not None:
            own = module.get_parameter("bias") if spec.has_bias else None
            site = _site(base, spec, rank_rows, own)
            adapted = AdaptedNorm(module, replace(site, normalize=_norm_of(module), weight=_weight_of(module)), cell)
        else:
            continue
        sites[name] = (adapted.parts, 0)
        _replace(base.model, name, adapted)
    attention = _attention(base, rank_rows, cell)
    sites |= {each.parts.site.members[0]: (each.parts, 0) for each in attention}
    outputs = _sublayers(base, linears, rank_rows, weight_formats)
    sites |= {each.parts.site.members[0]: (each.parts, 0) for each in outputs}
    return AdaptedModel(
        base.model, base, cell, tuple(groups), linears, sites, attention, outputs, {}, {}, capacity, weight_formats
    )


def _sublayers(
    base: LoadedBase,
    linears: Mapping[str, tuple[SiteGroup, int]],
    rank_rows: RankRowsTable,
    weight_formats: WeightFormats,
) -> tuple[AdaptedSublayer, ...]:
    found = []
    for each in sublayers(base.spec):
        norm, projection = base.model.get_submodule(each.norm), linears.get(each.projection)
        if isinstance(norm, AdaptedNorm) and projection is not None:
            width = base.spec.hidden_size
            site = Site(
                "sublayer", (each.name,), ((0, width),), width, base.compute_dtype, base.device, None, rank_rows,
                make_product=_products(weight_formats), is_invariant=weight_formats.invariant,
            )  # fmt: skip
            norm.sublayer = AdaptedSublayer(site)
            _replace(base.model, each.projection, SublayerProjection(*projection, norm.sublayer))
            found.append(norm.sublayer)
    return tuple(found)


def _products(weight_formats: WeightFormats) -> MakeProduct:
    return lambda weight, bias: DenseLinear(weight, bias, replace(weight_formats, packed=False)).forward


def _attention(base: LoadedBase, rank_rows: RankRowsTable, cell: StepCell) -> tuple[AdaptedAttention, ...]:
    spec = base.spec
    if spec.kv_heads is None or spec.kv_width is None:
        return ()
    width = 2 * spec.kv_heads * spec.kv_width
    return tuple(
        AdaptedAttention(
            Site(
                "attention", (spec.attention_name(layer),), ((0, width),), spec.vocab_size, base.compute_dtype,
                base.device, None, rank_rows,
            ),
            cell,
        )
        for layer in range(spec.num_layers)
    )  # fmt: skip


def _site(
    base: LoadedBase, spec: ModuleSpec, rank_rows: RankRowsTable, bias: torch.Tensor | None, scale: Any = None
) -> Site:
    """The site of a module that stands alone."""
    kind: SiteKind = "norm" if spec.kind == "norm" else "embedding"
    return Site(
        kind, (spec.name,), ((0, spec.out_features),), spec.in_features, base.compute_dtype, base.device,
        _on_host(bias), rank_rows, scale,
    )  # fmt: skip


def _on_host(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach().float().cpu()


def _make_group(
    base: LoadedBase, group: FrozenGroup, cell: StepCell, rank_rows: RankRowsTable, weight_formats: WeightFormats
) -> SiteGroup:
    frozen = group.frozen
    site = Site(
        "linear", group.names, group.columns, frozen.in_features, base.compute_dtype, base.device,
        _on_host(frozen.bias), rank_rows, weight=group.weight, make_product=_products(weight_formats),
    )  # fmt: skip
    return SiteGroup(frozen, site, cell, "logits" if group.names[0] == base.spec.head else "tokens")


def _table_of(module: nn.Embedding) -> Callable[[int], torch.Tensor]:
    def weight(_member: int) -> torch.Tensor:
        return module.weight.detach().T.to(torch.float32, copy=True)

    return weight


def _weight_of(module: nn.Module) -> Callable[[int], torch.Tensor]:
    def weight(_member: int) -> torch.Tensor:
        return module.get_parameter("weight").detach().to(torch.float32, copy=True)

    return weight


def _norm_of(module: nn.Module) -> Normalize:
    def normalize(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = functional_call(module, {"weight": weight}, (x,))
        return y

    return normalize


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
