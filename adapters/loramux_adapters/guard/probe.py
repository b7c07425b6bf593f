"""One short forward that learns how a model attends: no architecture needs an entry.

Refuses what a packed step would answer wrongly in silence: layers that mix tokens outside of attention, attention that
is called twice under one index, arguments that would be dropped, masks that are no window.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from loramux_adapters.base.load import BaseRefused
from loramux_adapters.guard.layers import AttentionLayer
from loramux_adapters.guard.masks import MaskFunction, MaskRefused, read_window

PROBE_NAME = "loramux_probe"
_TOKENS = 8

HARMLESS = frozenset(
    {
        "attention_mask", "cache_position", "dropout", "is_causal", "layer_idx", "logits_to_keep", "past_key_value",
        "past_key_values", "position_embeddings", "position_ids", "return_dict", "use_cache",
    }
)  # fmt: skip
"""Keyword arguments of attention that change nothing here: no dropout in eval mode, no cache but our own, positions
that query and key already carry."""


@torch.inference_mode()
def probe_attention(model: PreTrainedModel, context: int) -> list[AttentionLayer]:
    """What each decoder layer's attention looks like over `context` positions, in order of `layer_idx`.

    Sets the model's attention implementation to the probe's; whoever computes with the model sets another. Raises
    BaseRefused when a packed step could not be exact.
    """
    AttentionInterface.register(PROBE_NAME, _attention)
    AttentionMaskInterface.register(PROBE_NAME, _mask)
    model.set_attn_implementation(PROBE_NAME)
    probe = _Probe(context)
    _RUNNING.append(probe)
    try:
        ids = torch.zeros(1, min(_TOKENS, context), dtype=torch.long, device=model.get_input_embeddings().weight.device)
        # Positions are left to the model: given ones would be searched for packed sequences and end up in the masks.
        model(input_ids=ids, use_cache=False, ctx=probe)
    finally:
        _RUNNING.pop()
    return probe.result(model.config.get_text_config().num_hidden_layers)


@dataclass(eq=False)
class _Probe:
    """What the forward has shown so far."""

    context: int
    layers: dict[int, AttentionLayer] = field(default_factory=dict)
    masks: dict[int, tuple[torch.Tensor, MaskFunction]] = field(default_factory=dict)  # by id of the tensor built

    def see(
        self,
        module: nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: object,
        window: int | None,
        given: dict[str, Any],
    ) -> None:
        """One call of attention: key and value [1, heads, T, width], the window it states, what else it gives."""
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            raise BaseRefused("its attention does not say which layer it belongs to")
        if index in self.layers:
            raise BaseRefused(
                f"layer {index} calls attention more than once, and the second call would overwrite the first one's KV"
            )
        unknown = sorted(k for k, v in given.items() if k not in HARMLESS and v is not None and v is not False)
        if unknown:
            raise BaseRefused(f"layer {index} gives its attention {', '.join(unknown)}, which would be ignored")
        seen = self._window(index, mask, window)
        self.layers[index] = AttentionLayer(key.shape[1], key.shape[3], value.shape[3], seen)

    def _window(self, index: int, mask: object, stated: int | None) -> int | None:
        """By the mask where transformers built it: that is what eager attention and training see."""
        known = self.masks.get(id(mask))
        if known is None:
            return stated
        try:
            return read_window(known[1], self.context)
        except MaskRefused as error:
            if not error.exact_context:
                raise BaseRefused(f"layer {index} lets tokens see later ones: it is no causal decoder") from error
            hint = f"serve it with a context of {error.exact_context} tokens or less"
            raise BaseRefused(f"layer {index} attends in a pattern that is {error}; {hint}") from error

    def result(self, layers: int) -> list[AttentionLayer]:
        """All layers, if each of the model's called attention."""
        if not self.layers:
            raise BaseRefused("it does not route attention through transformers' attention interface")
        missing = sorted(set(range(layers)) - set(self.layers))
        if missing:
            raise BaseRefused(
                f"{len(missing)} of its {layers} layers (the first: {missing[0]}) mix tokens by other means than "
                "attention (recurrence, convolution), whose state this version does not keep per request"
            )
        if len(self.layers) != layers:
            raise BaseRefused(f"it calls attention for {len(self.layers)} layers and states {layers}")
        return [self.layers[index] for index in range(layers)]


_RUNNING: list[_Probe] = []
"""The probe whose forward runs: masks are built before any layer could hand it over."""


def _attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, KV, T, D]
    value: torch.Tensor,  # [1, KV, T, Dv]
    attention_mask: object,
    *,
    ctx: _Probe | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    if ctx is None:
        raise BaseRefused(
            "it does not hand its keyword arguments on to attention, so attention would not know the step"
        )
    ctx.see(module, key, value, attention_mask, sliding_window, given)
    return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def _mask(
    batch_size: int, q_length: int, kv_length: int, *, mask_function: MaskFunction, device: Any = "cpu", **_: Any
) -> torch.Tensor:
    """A stand-in [batch, 1, T, T] by which the layers name the function."""
    built = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)
    _RUNNING[-1].masks[id(built)] = (built, mask_function)
    return built
