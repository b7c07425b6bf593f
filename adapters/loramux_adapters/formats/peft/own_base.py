"""The base as far as the file of a LoRA tells: its modules by the names and shapes of the tensors.

So much is enough to read the file as strictly as for a base that is there: a LoRA names each module in full. What only
the base tells is left open: whether a linear map is a Conv1D, and which modules there are that the file does not name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from loramux_adapters.adapter_files import WEIGHTS_FILE
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.tensors import PREFIX
from loramux_adapters.formats.safetensors_file import SafetensorsFile
from loramux_adapters.formats.safetensors_header import TensorEntry
from loramux_adapters.spec import BaseModelSpec, ModuleKind, ModuleSpec, ParameterSpec

_ANY_ID = 1 << 40  # a vocabulary that no token id is over
# The end of a tensor's name -> the kind of its module, and which axes of the tensor are `in` and `out` of the map.
_LOW_RANK: Mapping[str, tuple[ModuleKind, int | None, int | None]] = {
    ".lora_A.weight": ("linear", 1, None),
    ".lora_B.weight": ("linear", None, 0),
    ".lora_embedding_A": ("embedding", 1, None),
    ".lora_embedding_B": ("embedding", None, 0),
}
_BIASES = (".base_layer.bias", ".bias")
_TABLES = (".base_layer.weight", ".weight")


def read_own_base(path: Path, limits: ReadLimits) -> tuple[BaseModelSpec, dict[str, torch.Tensor]]:
    """The base that the weights at `path` are for, without a fingerprint; and the weights of the base itself that are
    in the file, [vocabulary, width] by module: PEFT saves the embedding and the head where one of them is a target.

    A module of which there is a bias alone is taken for a norm. Raises AdapterInvalid for the header and for values
    that are not finite, and OSError; tensors that are no part of a LoRA are left to the reader.
    """
    with SafetensorsFile(path, WEIGHTS_FILE, limits) as file:
        entries = file.header.tensors.values()
        modules = _modules(entries)
        tables = {name: entry for entry in entries if (name := _module(entry, _TABLES)) and len(entry.shape) == 2}
        data = {name: file.read_bytes(entry) for name, entry in tables.items()}
        values = {name: file.decode(entry, data[name]) for name, entry in tables.items()}
    parameters = {
        f"{name}.weight": ParameterSpec(entry.shape, entry.dtype, hashlib.sha256(data[name]).hexdigest())
        for name, entry in tables.items()
    }
    # Of two tables without a low rank either may be the embedding's: both are kept as they are.
    adapted = [name for name, module in modules.items() if module.kind == "embedding"]
    likely = [
        *(name for name in adapted if name in tables),
        *(name for name in tables if name not in modules),
        *adapted,
    ]
    embedding = next(iter(likely), None)
    head = next((name for name in tables if name != embedding), None)
    for name, entry in tables.items():
        rows, width = entry.shape
        as_embedding = ModuleSpec(name, "embedding", rows, width, False)
        modules.setdefault(name, as_embedding if name == embedding else ModuleSpec(name, "linear", width, rows, False))
    ends = ([modules[embedding].in_features] if embedding else []) + ([modules[head].out_features] if head else [])
    base = BaseModelSpec(
        model_id="the file's own",
        architecture="unknown",
        fingerprint="",
        num_layers=0,
        hidden_size=0,
        vocab_size=next(iter(ends), _ANY_ID),
        context_length=0,
        tied_embeddings=False,
        embedding=embedding,
        head=head,
        modules=modules,
        parameters=parameters,
    )
    return base, values


def _modules(entries: Iterable[TensorEntry]) -> dict[str, ModuleSpec]:
    """Those with a low rank or a bias, in the order of the file."""
    kinds: dict[str, ModuleKind] = {}
    widths_in: dict[str, int] = {}
    widths_out: dict[str, int] = {}
    biases: dict[str, int] = {}
    for entry in entries:
        for suffix, (kind, axis_in, axis_out) in _LOW_RANK.items():
            if len(entry.shape) == 2 and (name := _module(entry, (suffix,))):
                kinds.setdefault(name, kind)
                for widths, axis in ((widths_in, axis_in), (widths_out, axis_out)):
                    if axis is not None:
                        widths[name] = entry.shape[axis]
        if len(entry.shape) == 1 and not entry.name.endswith(".lora_B.bias") and (name := _module(entry, _BIASES)):
            biases[name] = entry.shape[0]
    for name, width in biases.items():
        kinds.setdefault(name, "norm")
        widths_in.setdefault(name, width)
        widths_out.setdefault(name, width)
    return {
        name: ModuleSpec(name, kind, widths_in.get(name, 0), widths_out.get(name, 0), name in biases)
        for name, kind in kinds.items()
    }


def _module(entry: TensorEntry, suffixes: Iterable[str]) -> str:
    """The module of a tensor whose name ends so; empty where it does not, or is of a low rank."""
    if not entry.name.startswith(PREFIX):
        return ""
    rest = entry.name.removeprefix(PREFIX)
    suffix = next((suffix for suffix in suffixes if rest.endswith(suffix)), None)
    name = "" if suffix is None else rest.removesuffix(suffix)
    return "" if ".lora_" in name else name
