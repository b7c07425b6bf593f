"""NF4 by exact arithmetic: the same codes from the same weights on every device.

bitsandbytes' CUDA quantizer is built with approximate division: on float32 checkpoints its codes differ from the CPU's
once in millions of weights, in blocks of zeros always, and one base would have two fingerprints. Here every operation
is exactly rounded by IEEE 754 (maximum, reciprocal, product, comparison), so devices cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from loramux_adapters.base.bitsandbytes_compat import Params4bit, functional

_CHUNK = 1 << 24  # weights worked on at a time: three float32 copies of them are in memory
_LEAST = 1e-38  # divides blocks of zeros
_NESTED_BLOCK = 256
_ZERO_CODE = 7  # the code of 0.0, which fills the last byte of an odd number of weights


def quantize_nf4(weight: torch.Tensor, block_size: int, *, nested: bool = False) -> tuple[torch.Tensor, Any]:
    """Codes [n / 2, 1] uint8, high nibble first, and bitsandbytes' QuantState, for a weight of n values.

    Format: Dettmers et al., QLoRA (2023), as bitsandbytes 0.50 writes it on a CPU. `nested` quantizes the block scales
    to 8 bits too.
    """
    flat, bounds = weight.reshape(-1), _bounds(weight.device)
    pieces = torch.split(flat, _CHUNK // block_size * block_size)
    parts = [_quantize(piece, block_size, bounds) for piece in pieces]
    codes = torch.cat([codes for codes, _ in parts])
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=_ZERO_CODE)
    packed = ((codes[::2] << 4) | codes[1::2]).unsqueeze(1)
    absmax = torch.cat([scales for _, scales in parts])
    state = functional.QuantState(
        absmax=absmax,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=block_size,
        code=functional.get_4bit_type("nf4", device=weight.device),
        quant_type="nf4",
    )
    if nested:
        _nest(state)
    return packed, state


def _quantize(values: torch.Tensor, block_size: int, bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [n] uint8 and scales [blocks] float32 of whole blocks, or of a tensor's end with a short last one."""
    values = values.float()
    whole = values.numel() // block_size * block_size
    blocks = values[:whole].view(-1, block_size)
    absmax = blocks.abs().amax(-1) if whole else values.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=_LEAST))[:, None]).clamp(-1, 1).reshape(-1)
    if whole < values.numel():
        last = values[whole:].abs().max().clamp(min=_LEAST)
        absmax = torch.cat((absmax, last[None]))
        scaled = torch.cat((scaled, (values[whole:] / last).clamp(-1, 1)))
    return torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8), absmax


def _bounds(device: torch.device) -> torch.Tensor:
    """[15]: halfway between neighboring codes."""
    code: torch.Tensor = functional.get_4bit_type("nf4", device=torch.device("cpu")).float()
    return ((code[:-1] + code[1:]) / 2).to(device)


def _nest(state: Any) -> None:
    """Quantizes the scales on the CPU, whatever the device: their mean depends on the order of summation."""
    absmax = state.absmax.cpu()
    offset = absmax.mean()
    quantized, inner = functional.quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCK)
    device = state.absmax.device
    inner.absmax, inner.code = inner.absmax.to(device), inner.code.to(device)
    state.absmax, state.offset, state.state2, state.nested = quantized.to(device), offset.to(device), inner, True


class _ExactOperation(Bnb4bitQuantize):  # type: ignore[misc]  # untyped
    """Stands in for transformers' step from a checkpoint's tensor to a quantized parameter."""

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """The Params4bit of each tensor, by name."""
        assert model is not None  # transformers always gives it
        result: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module: Any = model.get_submodule(name.rpartition(".")[0])
            weight = weight.T.contiguous() if issubclass(module.source_cls, Conv1D) else weight
            old = vars(model.get_parameter(name))
            codes, state = quantize_nf4(weight, old["blocksize"], nested=old["compress_statistics"])
            known = old | {"quant_state": state, "bnb_quantized": True}
            result[name] = Params4bit(codes, requires_grad=False, **known)
            module.quant_state, module._is_hf_initialized = state, True
        return result


class _ExactQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]  # untyped
    def get_quantize_ops(self) -> _ExactOperation:
        return _ExactOperation(self)


@contextmanager
def exact_quantizer() -> Iterator[None]:
    """Within, transformers quantizes to 4 bits by `quantize_nf4`."""
    name = "bitsandbytes_4bit"
    before = AUTO_QUANTIZER_MAPPING[name]
    AUTO_QUANTIZER_MAPPING[name] = _ExactQuantizer
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[name] = before
