"""A base as `load_base` would hold it, without its weights: the same modules on the meta device, and their bytes.

Which linear maps become NF4 is asked of the quantizer that the load uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from loramux_adapters.base.bitsandbytes_compat import Linear4bit
from loramux_adapters.base.load import LoadedBase, base_spec, refuse_foreign_quantization

_BLOCK = 64  # weights of an NF4 block, bitsandbytes' default
_NESTED_BLOCK = 256
_CODE_BYTES = 16 * 4  # NF4's table, which every weight has of its own
_NESTED_CODE_BYTES = 256 * 4


@dataclass(frozen=True)
class BaseBytes:
    """Bytes of a base in memory. `scales`: absmax, and the tables beside them; `others`: parameters not in 4 bits, and
    buffers.
    """

    codes: int
    scales: int
    others: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.codes + self.scales + self.others


def read_unloaded(
    source: str | Path, *, compute_dtype: torch.dtype, device: torch.device, double_quant: bool = False
) -> LoadedBase:
    """What `load_base` gives for `device`, with every tensor on the meta device and no fingerprint.

    Raises OSError, ValueError and BaseRefused, as the load would.
    """
    source = str(source)
    config_json, _ = PretrainedConfig.get_config_dict(source)
    refuse_foreign_quantization(config_json)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    declared: Any = config_json.get("quantization_config")
    options = declared or {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
    }
    quantizer = AutoHfQuantizer.from_config(
        BitsAndBytesConfig(**{key: value for key, value in options.items() if key != "quant_method"}),
        pre_quantized=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=compute_dtype)
        quantizer.preprocess_model(model=model, dtype=compute_dtype, device_map={"": device}, checkpoint_files=None)
    model.eval().requires_grad_(False)
    spec = base_spec(model, source, "", {})
    return LoadedBase(model, spec, source, model.config, config_json, compute_dtype, device)


def base_bytes(base: LoadedBase) -> BaseBytes:
    """Of an unloaded base."""
    codes = scales = others = 0
    four_bit = {id(module.weight) for module in base.model.modules() if isinstance(module, Linear4bit)}
    for module in base.model.modules():
        if isinstance(module, Linear4bit):
            count = module.weight.numel()
            codes += -(-count // 2)
            scales += _scale_bytes(-(-count // _BLOCK), is_nested=bool(module.weight.compress_statistics))
    for tensor in _tensors(base.model):
        if id(tensor) not in four_bit:
            size = base.compute_dtype.itemsize if isinstance(tensor, nn.Parameter) else tensor.element_size()
            others += tensor.numel() * size
    return BaseBytes(codes, scales, others)


def _scale_bytes(blocks: int, *, is_nested: bool) -> int:
    if not is_nested:
        return blocks * 4 + _CODE_BYTES
    inner = -(-blocks // _NESTED_BLOCK) * 4
    return blocks + inner + _CODE_BYTES + _NESTED_CODE_BYTES + 4  # their mean


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Each once: a tied head shares the embedding's."""
    yield from model.parameters()
    yield from model.buffers()
