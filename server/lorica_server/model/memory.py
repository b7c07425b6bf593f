"""Sizes of what the server keeps beside the base: KV blocks, and the shape of every attention layer.

Learns the shapes from one forward of the model itself, so that no architecture needs an entry here.
"""

from __future__ import annotations

import torch
from lorica_adapters.apply.inject import AdaptedModel

from lorica_server.model.attention import ATTENTION_NAME, ShapeProbe, register
from lorica_server.model.cache import LayerShape, PagedCache, bytes_per_token


@torch.inference_mode()
def probe_layers(adapted: AdaptedModel) -> list[LayerShape]:
    """KV shape of each attention layer in order of `layer_idx`. Raises ValueError when layers are missing."""
    register()
    adapted.model.set_attn_implementation(ATTENTION_NAME)
    probe = ShapeProbe()
    ids = torch.zeros(1, 8, dtype=torch.long, device=adapted.base.device)
    adapted.model(
        input_ids=ids, position_ids=torch.arange(8, device=ids.device)[None], attention_mask=None, use_cache=False,
        ctx=probe,
    )  # fmt: skip
    if sorted(probe.layers) != list(range(len(probe.layers))) or not probe.layers:
        raise ValueError(f"the model called attention for layers {sorted(probe.layers)}: cannot page its cache")
    return [probe.layers[index] for index in range(len(probe.layers))]


def make_cache(adapted: AdaptedModel, kv_bytes: int, block_size: int) -> PagedCache:
    """A cache of at most `kv_bytes`, one block of it the scratch block (the last, never planned)."""
    layers = probe_layers(adapted)
    dtype = adapted.base.compute_dtype
    blocks = kv_bytes // (bytes_per_token(layers, dtype) * block_size)
    return PagedCache(layers, max(int(blocks), 2), block_size, dtype, adapted.base.device)
