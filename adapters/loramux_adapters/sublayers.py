"""Sub-layers: where the output of a layer's attention or MLP passes on its way to the residual stream. Torch-free.

No module of a base is one: it begins at the norm that reads the residual stream and ends at a projection. A sub-layer
has a name beside those of modules, by which an adapter's parts are keyed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loramux_adapters.spec import BaseModelSpec

Place = Literal["attention", "mlp"]

_LLAMA: dict[Place, tuple[str, str]] = {
    "attention": ("input_layernorm", "self_attn.o_proj"),
    "mlp": ("post_attention_layernorm", "mlp.down_proj"),
}
_GEMMA: dict[Place, tuple[str, str]] = {**_LLAMA, "mlp": ("pre_feedforward_layernorm", "mlp.down_proj")}
_ENDS: dict[str, dict[Place, tuple[str, str]]] = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": {"attention": ("ln_1", "attn.c_proj"), "mlp": ("ln_2", "mlp.c_proj")},
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
"""Architecture -> (norm, projection) within a layer; the norm is called with the residual stream itself."""

ARCHITECTURES = tuple(_ENDS)


@dataclass(frozen=True)
class Sublayer:
    """One of them."""

    place: Place
    layer: int
    layer_name: str  # the layer's module
    norm: str  # the module whose input is what the output will be added to
    projection: str  # the module whose output is the sub-layer's

    @property
    def name(self) -> str:
        """What adapters call it."""
        return f"layers.{self.layer}.{self.place}_output"


def sublayers(base: BaseModelSpec) -> tuple[Sublayer, ...]:
    """All of a base, layer by layer; none where the architecture's are not known."""
    found = []
    for place, (norm, projection) in _ENDS.get(base.architecture, {}).items():
        for name in base.modules:
            layer_name, is_norm, _ = name.rpartition(f".{norm}")
            if is_norm and name.endswith(norm) and f"{layer_name}.{projection}" in base.modules:
                layer = int(layer_name.rpartition(".")[2])
                found.append(Sublayer(place, layer, layer_name, name, f"{layer_name}.{projection}"))
    return tuple(sorted(found, key=lambda each: (each.layer, each.place)))
