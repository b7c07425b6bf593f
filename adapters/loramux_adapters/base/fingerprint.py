"""The base's fingerprint: sha256 over its logical content, independent of compute dtype and memory layout.

Source of the definition: docs/identity.md. A float32 CPU server and a bf16 GPU server of one checkpoint agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from loramux_adapters.spec import ParameterSpec

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}

_ROWS_AT_A_TIME = 4096

CONFIG_NOT_ARITHMETIC = frozenset(
    {
        "_name_or_path", "_attn_implementation_autoset", "_commit_hash", "architectures", "auto_map", "bos_token_id",
        "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task", "id2label", "keys_to_ignore_at_inference",
        "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type",
        "quantization_config", "return_dict", "sep_token_id", "task_specific_params", "torch_dtype", "torchscript",
        "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache", "initializer_range", "unk_token_id",
        "attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout",
    }
)  # fmt: skip
"""Keys of config.json that name things, steer training or I/O, or repeat what the weights already say."""


class QuantizedModule(NamedTuple):
    """One NF4 weight: codes [out, in / 2] uint8, absmax float32 after undoing double quantization."""

    codes: torch.Tensor
    absmax: torch.Tensor
    block_size: int


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements' little-endian bytes, in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def parameter_spec(tensor: torch.Tensor) -> ParameterSpec:
    """Shape, dtype and sha256 of a parameter's raw little-endian bytes."""
    dtype = SAFETENSORS_DTYPES.get(tensor.dtype, str(tensor.dtype))
    return ParameterSpec(tuple(tensor.shape), dtype, hashlib.sha256(raw_bytes(tensor)).hexdigest())


def rounded_hashes(tensor: torch.Tensor) -> dict[str, str]:
    """What `ParameterSpec.rounded` is: adapters hold copies of the embedding in the dtype they were trained in."""
    hashes: dict[str, str] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if tensor.dtype not in SAFETENSORS_DTYPES or torch.promote_types(tensor.dtype, dtype) == dtype:
            continue  # holds every value of the parameter's own
        digest, exact = hashlib.sha256(), True
        for rows in torch.split(tensor.detach(), _ROWS_AT_A_TIME):
            stored = rows.to(dtype)
            exact = exact and torch.equal(stored.to(tensor.dtype), rows)
            digest.update(raw_bytes(stored))
        if not exact:
            hashes[SAFETENSORS_DTYPES[dtype]] = digest.hexdigest()
    return hashes


def fingerprint(
    quantized: Iterable[tuple[str, QuantizedModule]],
    parameters: Mapping[str, ParameterSpec],
    config: Mapping[str, Any],
) -> str:
    """64 hex digits over NF4 modules (in any order), unquantized parameters and the arithmetic keys of config.json."""
    pieces = fingerprinting(quantized, parameters, config)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            digest: str = end.value
            return digest


def fingerprinting(
    quantized: Iterable[tuple[str, QuantizedModule]],
    parameters: Mapping[str, ParameterSpec],
    config: Mapping[str, Any],
) -> Generator[None, None, str]:
    """`fingerprint` module by module, for whoever has other work in between."""
    # The project's former name stays: other bytes here would give every base another identity.
    total = hashlib.sha256(b"lorica-base-v1\n")
    lines = []
    for name, module in quantized:
        digest = hashlib.sha256()
        for tensor in (module.codes, module.absmax):
            digest.update(raw_bytes(tensor))
        out_features, half = module.codes.shape
        lines.append(json.dumps(["nf4", name, out_features, half * 2, module.block_size, digest.hexdigest()]))
        yield
    lines += [json.dumps(["full", name, p.dtype, list(p.shape), p.sha256]) for name, p in parameters.items()]
    for line in sorted(lines):
        total.update(line.encode() + b"\n")
    arithmetic = {key: value for key, value in config.items() if key not in CONFIG_NOT_ARITHMETIC and value is not None}
    total.update(json.dumps(arithmetic, sort_keys=True).encode())
    return total.hexdigest()
