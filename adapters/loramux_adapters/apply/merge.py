"""A hot adapter's own dense weights: dequant(W) + B A and its whole bias, per group it touches.

The base is read, never written. Keyed by (digest, fingerprint), since both make the numbers. Knows no policy: when to
build and when to use is decided by the server.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from loramux_adapters.apply.batch import MergedWeights
from loramux_adapters.apply.group import SiteGroup
from loramux_adapters.apply.inject import AdaptedModel
from loramux_adapters.base.frozen import DenseLinear
from loramux_adapters.base.weight_formats import WeightFormats
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.parts.registry import KIND_OF, fold_parts
from loramux_adapters.weights import AdapterWeights


def merged_bytes(adapted: AdaptedModel, weights: AdapterWeights) -> int:
    """Device bytes `merge` will take: whole groups, since siblings are one product."""
    groups = _groups(adapted, weights)
    return sum(g.frozen.out_features * g.frozen.in_features for g in groups) * adapted.base.compute_dtype.itemsize


def merge(adapted: AdaptedModel, weights: AdapterWeights) -> MergedWeights:
    """Builds the merged weights at once, see `merging`."""
    pieces = merging(adapted, weights)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            merged: MergedWeights = end.value
            return merged


def merging(adapted: AdaptedModel, weights: AdapterWeights) -> Generator[None, None, MergedWeights]:
    """Builds the merged weights in float32 and rounds once to the compute dtype, one group of siblings a piece.

    Between two pieces steps may run. Raises AdapterIncompatible where nothing of it is in a linear map's weight.
    """
    dtype = adapted.base.compute_dtype
    weight_formats = WeightFormats(native=adapted.weight_formats.native)
    merged: dict[str, DenseLinear] = {}
    groups = _groups(adapted, weights)
    if not groups:
        raise _unmergeable(weights)
    for group in groups:
        weight, own = group.frozen.dequantize(torch.float32), group.frozen.bias
        bias = torch.zeros(len(weight), device=weight.device) if own is None else own.float().clone()
        for name, (begin, end) in zip(group.members, group.columns, strict=True):
            module = weights.modules.get(name)
            fold_parts(weight[begin:end], bias[begin:end], () if module is None else module.parts)
        has_bias = own is not None or bool(bias.any())
        merged[group.key] = DenseLinear(weight.to(dtype), bias.to(dtype) if has_bias else None, weight_formats)
        del weight
        yield
    return MergedWeights(weights.spec.digest, merged)


def _unmergeable(weights: AdapterWeights) -> AdapterIncompatible:
    """Beside parts that are folded, those that are in no weight act in merged steps as in any other."""
    kinds = (KIND_OF[type(part)] for module in weights.modules.values() for part in module.parts)
    reason = next((kind.unfoldable for kind in kinds if kind.unfoldable), "it changes no linear map of the base")
    return AdapterIncompatible(
        f"nothing of the adapter can be merged: {reason}", subject=weights.spec.kind, remedy="serve it as it is"
    )


def _groups(adapted: AdaptedModel, weights: AdapterWeights) -> list[SiteGroup]:
    return [group for group in adapted.groups if any(name in weights.modules for name in group.members)]
