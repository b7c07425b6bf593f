"""How the package was attached to the model that was trained: by layers of its own, or by hooks on the model's modules.

A hooked one says where in adapter_interface.json. Source: adapters 1.3.0, `wrappers/interfaces.py`, `init_bottleneck`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.adapter_files import INTERFACE_FILE
from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats import strict_json
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.refusals import quote
from loramux_adapters.spec import BaseModelSpec
from loramux_adapters.sublayers import Place, sublayers

# The package has layers of its own for llama, mistral and gpt2.
_HOOKED = frozenset({"gemma2", "gemma3_text", "qwen2", "qwen3"})
_NORMED_OUTPUTS = frozenset({"gemma2", "gemma3_text"})
# Where a sub-layer begins and ends.
_KEYS: Mapping[Place, tuple[str, str]] = {
    "attention": ("layer_pre_self_attn", "attn_o_proj"),
    "mlp": ("layer_pre_ffn", "layer_output_proj"),
}


@dataclass(frozen=True)
class Interface:
    """`has_norms`: some sub-layer's outputs are normalized before they are added to the residual stream, and
    original_ln_before applies that norm.
    """

    is_hooked: bool
    has_norms: bool


def read_interface(files: Mapping[str, Path], base: BaseModelSpec, limits: ReadLimits) -> Interface:
    """What the file says, without one the package's own choice for the base's architecture.

    Raises AdapterInvalid, or AdapterIncompatible where other modules were hooked than the sub-layers' here.
    """
    if INTERFACE_FILE not in files:
        return Interface(base.architecture in _HOOKED, base.architecture in _NORMED_OUTPUTS)
    content = strict_json.read_object(files[INTERFACE_FILE], INTERFACE_FILE, limits.max_config_bytes).get("interface")
    if not isinstance(content, dict):
        raise AdapterInvalid(
            f"{INTERFACE_FILE}: interface {quote(content)} is no object",
            subject=f"{INTERFACE_FILE}: interface",
            remedy="upload the file as adapters wrote it",
        )
    for sublayer in sublayers(base)[:2]:
        begin, end = _KEYS[sublayer.place]
        within = f"{sublayer.layer_name}."
        projection = content.get(end)
        if sublayer.place == "attention":
            projection = f"{content.get('layer_self_attn')}.{projection}"
        _check(begin, content.get(begin), sublayer.norm.removeprefix(within))
        _check(end, projection, sublayer.projection.removeprefix(within))
    return Interface(True, any(content.get(key) is not None for key in ("layer_ln_1", "layer_ln_2")))


def _check(key: str, found: object, expected: str) -> None:
    if found != expected:
        raise AdapterIncompatible(
            f"{INTERFACE_FILE}: {key}: adapters were hooked to {quote(found)}; here they act on {expected}",
            subject=f"{INTERFACE_FILE}: {key}",
            remedy="train with the interface that adapters has for this architecture",
        )
