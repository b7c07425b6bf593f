"""The KV shape of every attention layer, learnt from one forward of the model: no architecture needs an entry."""

from __future__ import annotations

import torch

from lorica_adapters.base import LoadedBase
from lorica_server.model.attention import ATTENTION_NAME, register
from lorica_server.model.cache import LayerShape
from lorica_server.model.paged_context import ShapeProbe


@torch.inference_mode()
def probe_layers(base: LoadedBase) -> list[LayerShape]:
    """KV shape of each attention layer in order of `layer_idx`. Raises ValueError when layers are missing."""
    register()
    base.model.set_attn_implementation(ATTENTION_NAME)
    probe = ShapeProbe()
    ids = torch.zeros(1, 8, dtype=torch.long, device=base.device)
    base.model(
        input_ids=ids, position_ids=torch.arange(8, device=ids.device)[None], attention_mask=None, use_cache=False,
        ctx=probe,
    )  # fmt: skip
    if sorted(probe.layers) != list(range(len(probe.layers))) or not probe.layers:
        raise ValueError(f"the model called attention for layers {sorted(probe.layers)}: cannot page its cache")
    return [probe.layers[index] for index in range(len(probe.layers))]
