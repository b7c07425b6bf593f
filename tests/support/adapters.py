"""Tiny random models of every architecture we serve, their BaseModelSpec, and adapters that PEFT itself made.

No quantization: what is tested with these is names, shapes and arithmetic of adapters.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramux_adapters.adapter_files import CONFIG_FILE, MAX_FILE_BYTES, WEIGHTS_FILE
from loramux_adapters.base.fingerprint import rounded_hashes
from loramux_adapters.spec import BaseModelSpec, ModuleSpec, ParameterSpec

CONFIG, WEIGHTS = CONFIG_FILE, WEIGHTS_FILE
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2")

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def tiny_model(architecture: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 causal model: vocabulary 64, width 32, two layers."""
    if architecture == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    tokens = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CONFIG_MAPPING[architecture](**(sizes | tokens | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    return model.eval()


def spec_of(model: PreTrainedModel) -> BaseModelSpec:
    """The BaseModelSpec of an unquantized model, with a fingerprint over all of its parameters."""
    names = {module: name for name, module in model.named_modules()}
    parameters = {name: _parameter_spec(tensor) for name, tensor in model.named_parameters()}
    config = model.config
    return BaseModelSpec(
        model_id=f"tiny-{config.model_type}",
        architecture=config.model_type,
        fingerprint=hashlib.sha256(repr(sorted(parameters.items())).encode()).hexdigest(),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        tied_embeddings=bool(config.tie_word_embeddings),
        embedding=names.get(model.get_input_embeddings()),
        head=names.get(model.get_output_embeddings()),
        modules={spec.name: spec for spec in _module_specs(model)},
        parameters=parameters,
        kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
        kv_width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )


def _module_specs(model: nn.Module) -> Iterator[ModuleSpec]:
    for name, module in model.named_modules():
        has_bias = getattr(module, "bias", None) is not None
        match module:
            case nn.Linear():
                yield ModuleSpec(name, "linear", module.in_features, module.out_features, has_bias)
            case Conv1D():
                yield ModuleSpec(name, "conv1d", module.nx, module.nf, has_bias)
            case nn.Embedding():
                yield ModuleSpec(name, "embedding", module.num_embeddings, module.embedding_dim, False)
            case _ if "norm" in type(module).__name__.lower():
                width = module.weight.shape[0]
                yield ModuleSpec(name, "norm", width, width, has_bias)


def _parameter_spec(tensor: torch.Tensor) -> ParameterSpec:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    sha256 = hashlib.sha256(raw.data).hexdigest()
    return ParameterSpec(tuple(tensor.shape), _DTYPES[tensor.dtype], sha256, rounded_hashes(tensor))


@contextmanager
def peft_warnings_ignored() -> Iterator[None]:
    """PEFT warns about much that the tests do on purpose: tied weights, saved embeddings, flags it corrects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def wrap(model: PreTrainedModel, *, seed: int = 0, **options: Any) -> PeftModel:
    """A copy of `model` with a LoRA of `options` (LoraConfig's), every adapter tensor and trained bias random."""
    with peft_warnings_ignored(), torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**({"task_type": "CAUSAL_LM"} | options)))
        randomize(wrapped)
    return wrapped


def randomize(wrapped: PeftModel) -> None:
    """Give every trainable tensor of `wrapped` random values, so that no delta is zero."""
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)


def save(wrapped: PeftModel, directory: Path, **options: Any) -> Path:
    """`save_pretrained` into `directory`, without PEFT's model card."""
    with peft_warnings_ignored():
        wrapped.save_pretrained(str(directory), **options)
    (directory / "README.md").unlink(missing_ok=True)
    return directory


def make_adapter(model: PreTrainedModel, directory: Path, *, seed: int = 0, **options: Any) -> Path:
    """A PEFT directory of a random LoRA of `options` (LoraConfig's) on `model`. Returns `directory`."""
    return save(wrap(model, seed=seed, **options), directory)


def files_of(directory: Path) -> dict[str, Path]:
    """The files of a PEFT directory as the registry takes them."""
    return {name: directory / name for name in MAX_FILE_BYTES if (directory / name).exists()}


def edit_config(directory: Path, **changes: Any) -> None:
    """Set keys of adapter_config.json."""
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(
    directory: Path,
    change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Replace the tensors of adapter_model.safetensors by what `change` makes of them."""
    path = directory / WEIGHTS
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata or {}))


def load_in_peft(model: PreTrainedModel, directory: Path) -> PeftModel:
    """The adapter on a copy of `model`, as PEFT loads it."""
    with peft_warnings_ignored():
        return PeftModel.from_pretrained(copy.deepcopy(model), str(directory)).eval()


def peft_deltas(wrapped: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    """PEFT's own delta [out, in] of every module that `adapter` adapts (for an embedding [width, vocabulary])."""
    deltas = {}
    for name, layer in wrapped.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.scaling:
            delta = layer.get_delta_weight(adapter).detach()
            is_transposed = isinstance(layer.get_base_layer(), (Conv1D, nn.Embedding))
            deltas[name] = delta.T if is_transposed else delta
    return deltas
