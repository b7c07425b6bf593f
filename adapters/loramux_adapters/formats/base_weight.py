"""Whether a saved copy of the embedding or head is the base's own tensor, so that it can be left out.

PEFT writes such a copy when the embedding or head is a target. A different one was trained beside the adapter, or is
another base's.
"""

from __future__ import annotations

import hashlib

import torch

from loramux_adapters.adapter_files import WEIGHTS_FILE
from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.formats.refusals import quote
from loramux_adapters.formats.safetensors_file import TORCH_DTYPES
from loramux_adapters.formats.safetensors_header import TensorEntry
from loramux_adapters.spec import BaseModelSpec, ParameterSpec


def check_is_base_weight(module: str, entry: TensorEntry, tensor: torch.Tensor, base: BaseModelSpec) -> None:
    """Raises AdapterInvalid unless `tensor` equals the weight of `module` as the base's checkpoint stores it, at the
    precision of the file. Of a vocabulary that was resized it is the base's part.
    """
    own = _own_parameter(module, base)
    if own is None or tuple(tensor.shape) != own.shape or not _is_same(tensor, entry.dtype, own):
        raise AdapterInvalid(
            f"{WEIGHTS_FILE}: tensor {quote(entry.name)} differs from the base's own weight of {quote(module)}",
            subject=f"{WEIGHTS_FILE}: {quote(entry.name)}",
            remedy=_remedy(entry, own),
        )


def _remedy(entry: TensorEntry, own: ParameterSpec | None) -> str:
    if own is not None and entry.shape[1:] != own.shape[1:]:
        return f"its shape is {list(entry.shape)}, the base's {list(own.shape)}: upload an adapter made for this base"
    return (
        "name a trained embedding or head in modules_to_save; where it was not trained, save with "
        "save_embedding_layers=False"
    )


def _own_parameter(module: str, base: BaseModelSpec) -> ParameterSpec | None:
    own = base.parameters.get(f"{module}.weight")
    if own is None and base.tied_embeddings and module == base.head:
        return base.parameters.get(f"{base.embedding}.weight")
    return own


def _is_same(tensor: torch.Tensor, dtype: str, own: ParameterSpec) -> bool:
    """Whether `tensor` is the base's parameter, or that rounded to the dtype in which the adapter was saved."""
    if _sha256_in_dtype(tensor, own.dtype) == own.sha256:
        return True
    return dtype in own.rounded and _sha256_in_dtype(tensor, dtype) == own.rounded[dtype]


def _sha256_in_dtype(tensor: torch.Tensor, dtype: str) -> str | None:
    """Hash of `tensor` in the checkpoint's dtype, None when the cast there would lose anything."""
    stored = tensor.to(TORCH_DTYPES[dtype]) if dtype in TORCH_DTYPES else None
    if stored is None or not torch.equal(stored.to(tensor.dtype), tensor):
        return None
    return hashlib.sha256(stored.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
