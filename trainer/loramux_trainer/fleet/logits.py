"""What a model does to its logits behind the head, found by asking it, so that the head can be computed in chunks.

transformers has no name for it: Gemma 2 caps them, Cohere and Granite scale them. What is found is compared with the
model's own; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from loramux_adapters.base.load import BaseRefused, LoadedBase

Postprocess = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def find_postprocess(base: LoadedBase, head: nn.Module) -> Postprocess:
    """Raises BaseRefused where it is none of these. The model must not have another forward of the head."""
    width = base.spec.vocab_size
    values = torch.linspace(-60, 60, 2 * width, device=base.device, dtype=base.compute_dtype).view(2, width)
    head.forward = lambda hidden: values[None].clone()
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=base.device)
        given: torch.Tensor = base.model(input_ids=ids, use_cache=False).logits[0]
    finally:
        del head.forward
    for candidate in _candidates(base, values, given):
        if torch.allclose(candidate(values).float(), given.float(), rtol=1e-5, atol=1e-6):
            return candidate
    raise BaseRefused(f"{type(base.model).__name__} changes its logits behind the head in a way that is not known")


def _candidates(base: LoadedBase, values: torch.Tensor, given: torch.Tensor) -> list[Postprocess]:
    found: list[Postprocess] = [lambda logits: logits]
    cap = getattr(base.model.config.get_text_config(), "final_logit_softcapping", None)
    if isinstance(cap, (int, float)) and cap > 0:
        found.append(lambda logits: torch.tanh(logits / cap) * cap)
    factor = float(given[-1, -1]) / float(values[-1, -1])
    found.append(lambda logits: logits * factor)
    return found
