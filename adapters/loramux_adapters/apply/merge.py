"""A hot adapter's own dense weights: dequant(W) + B A and its whole bias, per group it touches.

The base is read, never written. Keyed by (digest, fingerprint), since both make the numbers. Knows no policy: when to
build and when to use is decided by the server.
"""

from __future__ import annotations

import torch

from loramux_adapters.apply.batch import MergedWeights
from loramux_adapters.apply.group import SiteGroup
from loramux_adapters.apply.inject import AdaptedModel
from loramux_adapters.frozen import DenseLinear, Layouts
from loramux_adapters.weights import AdapterWeights


def merged_bytes(adapted: AdaptedModel, weights: AdapterWeights) -> int:
    """Device bytes `merge` will take: whole groups, since siblings are one product."""
    groups = _groups(adapted, weights)
    return sum(g.frozen.out_features * g.frozen.in_features for g in groups) * adapted.base.compute_dtype.itemsize


def merge(adapted: AdaptedModel, weights: AdapterWeights) -> MergedWeights:
    """Builds the merged weights in float32 and rounds once to the compute dtype."""
    dtype = adapted.base.compute_dtype
    layouts = Layouts(native=adapted.layouts.native)
    dense: dict[str, DenseLinear] = {}
    for group in _groups(adapted, weights):
        weight = group.frozen.dequantize(torch.float32)
        bias = None if group.frozen.bias is None else group.frozen.bias.float()
        for name, (begin, end) in zip(group.members, group.columns, strict=True):
            module = weights.modules.get(name)
            if module is None:
                continue
            if module.low_rank is not None:
                low_rank = module.low_rank
                weight[begin:end].addmm_(low_rank.b.to(weight), low_rank.a.to(weight))
            if module.bias is not None:
                bias = torch.zeros(group.frozen.out_features, device=weight.device) if bias is None else bias.clone()
                bias[begin:end] = module.bias.to(weight.device)
        dense[group.key] = DenseLinear(weight.to(dtype), None if bias is None else bias.to(dtype), layouts)
    return MergedWeights(weights.spec.digest, dense)


def _groups(adapted: AdaptedModel, weights: AdapterWeights) -> list[SiteGroup]:
    return [group for group in adapted.groups if any(name in weights.modules for name in group.members)]
