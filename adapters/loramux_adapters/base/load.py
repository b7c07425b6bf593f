"""The one entry point to the base model: load it in NF4, guard it, fingerprint it. Server and trainer share it.

Quantizes from the checkpoint's own dtype and fingerprints before any cast, so that identity does not depend on where
the base runs. Knows nothing of adapters or requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import set_tqdm_hook

from loramux_adapters.base.bitsandbytes_compat import Linear4bit
from loramux_adapters.base.fingerprint import QuantizedModule, fingerprint, parameter_spec, rounded_hashes
from loramux_adapters.base.frozen import logical_nf4
from loramux_adapters.base.quantize import exact_quantizer
from loramux_adapters.spec import BaseModelSpec, ModuleKind, ModuleSpec, ParameterSpec


class BaseRefused(Exception):
    """The operator must act: this checkpoint cannot be served exactly. Says why and what would do."""


@dataclass(frozen=True, eq=False)
class LoadedBase:
    """A frozen model in eval mode: NF4 linears, everything else in `compute_dtype`, no gradients."""

    model: PreTrainedModel
    spec: BaseModelSpec
    source: str
    config: PretrainedConfig
    config_json: dict[str, Any]  # raw, as the checkpoint stores it
    compute_dtype: torch.dtype
    device: torch.device


def load_base(
    source: str | Path,
    *,
    compute_dtype: torch.dtype,
    device: torch.device | str = "cpu",
    double_quant: bool = False,
    revision: str | None = None,
) -> LoadedBase:
    """Loads a Hugging Face causal LM (hub id or directory) with NF4 linears (bitsandbytes through transformers).

    `double_quant` quantizes the block scales too (0.4 bit a weight less, another fingerprint); checkpoints that are
    already NF4 keep their own. Raises BaseRefused, and OSError when the source cannot be read.
    """
    source, device = str(source), torch.device(device)
    config_json, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    refuse_foreign_quantization(config_json)
    options: dict[str, Any] = {}
    if not config_json.get("quantization_config"):  # what a checkpoint says of itself must not be given as None
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_use_double_quant=double_quant,
        )
    with _without_bar(), exact_quantizer():
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype="auto",
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    model.eval().requires_grad_(False)
    ask_for_logits_only(model.config)
    switch_off_repacking(model)
    spec = _describe(model, source, config_json)
    _cast(model, compute_dtype)
    return LoadedBase(model, spec, source, model.config, config_json, compute_dtype, device)


def ask_for_logits_only(config: PretrainedConfig) -> None:
    """Fine-tunes leave switches of their training on, which make a forward give more than logits, or a tuple."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for switch in ("output_attentions", "output_hidden_states", "output_router_logits"):
            if getattr(part, switch, False):
                setattr(part, switch, False)
        part.return_dict = True


@contextmanager
def _without_bar() -> Iterator[None]:
    """transformers draws a bar over the tensors it loads: seconds of it, in logs too, and within the bar of a caller
    who shows one. The bar of a download is the hub's own and stays: it is for minutes.
    """
    before = set_tqdm_hook(lambda bar, args, options: bar(*args, **(options | {"disable": True})))
    try:
        yield
    finally:
        set_tqdm_hook(before)


def switch_off_repacking(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking NF4 weights in place at the first eval forward on AVX512-BF16 CPUs.

    After that repacking its own `dequantize_4bit` returns garbage and gradients vanish.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def refingerprint(base: LoadedBase) -> str:
    """The fingerprint recomputed from the NF4 content the model holds now.

    Unquantized parameters enter as recorded at load: they were cast to the compute dtype since. To be called on a
    model whose Linear4bit modules are still in place (the trainer's case).
    """
    return fingerprint(quantized_modules(base.model), base.spec.parameters, base.config_json)


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QuantizedModule]]:
    """Every NF4 module's logical content, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield name, QuantizedModule(*logical_nf4(module))


def refuse_foreign_quantization(config_json: dict[str, Any]) -> None:
    """Raises BaseRefused for weights that are quantized already, but not as this package reads them."""
    declared = config_json.get("quantization_config")
    if not declared:
        return
    if not isinstance(declared, dict):
        raise BaseRefused("quantization_config in config.json is not an object: give an unquantized checkpoint")
    if not declared.get("load_in_4bit") or declared.get("bnb_4bit_quant_type") != "nf4":
        method = declared.get("quant_method", "unknown")
        raise BaseRefused(
            f"the checkpoint is quantized by {method}, not as bitsandbytes NF4: give the unquantized checkpoint "
            "(it is quantized at load) or one saved with load_in_4bit and bnb_4bit_quant_type nf4"
        )


def _describe(model: PreTrainedModel, source: str, config_json: dict[str, Any]) -> BaseModelSpec:
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    parameters = {
        name: parameter_spec(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not (name.endswith(".weight") and isinstance(model.get_submodule(name[: -len(".weight")]), Linear4bit))
    }
    rounded: dict[int, dict[str, str]] = {}  # by the tensor, which a tied head shares
    for name in {names.get(id(embedding)), names.get(id(head))}:
        if (known := parameters.get(f"{name}.weight")) is not None:
            weight = model.get_parameter(f"{name}.weight")
            if id(weight) not in rounded:
                rounded[id(weight)] = rounded_hashes(weight)
            parameters[f"{name}.weight"] = replace(known, rounded=rounded[id(weight)])
    digest = fingerprint(quantized_modules(model), parameters, config_json)
    return base_spec(model, source, digest, parameters)


def base_spec(
    model: PreTrainedModel, source: str, digest: str, parameters: Mapping[str, ParameterSpec]
) -> BaseModelSpec:
    """What adapters see of a model whose fingerprint is `digest`; its tensors are not read."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    config = model.config.get_text_config()
    kv_shape = _kv_shape(config)
    return BaseModelSpec(
        model_id=model_id(source),
        architecture=model.config.model_type,
        fingerprint=digest,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context_length=context_length(config),
        tied_embeddings=head is not None and head.weight is embedding.weight,
        embedding=names.get(id(embedding)),
        head=names.get(id(head)),
        modules=module_specs(model),
        parameters=parameters,
        kv_heads=kv_shape[0],
        kv_width=kv_shape[1],
    )


def _kv_shape(config: Any) -> tuple[int | None, int | None]:
    """(heads, width of a head) of keys and values, as the config says it for all layers; Nones where it does not."""
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None)
    if width is None and isinstance(getattr(config, "num_attention_heads", None), int):
        width = config.hidden_size // config.num_attention_heads
    return (heads, width) if isinstance(heads, int) and isinstance(width, int) else (None, None)


def model_id(source: str) -> str:
    """What messages and listings call the base: without the path to it."""
    return Path(source).name if Path(source).exists() else source


def module_specs(model: PreTrainedModel) -> dict[str, ModuleSpec]:
    """What adapters may find in a model, by name; its tensors are not read and may be on the meta device."""
    embedding = model.get_input_embeddings()
    return {
        spec.name: spec
        for name, module in model.named_modules()
        if (spec := _module_spec(name, module, is_embedding=module is embedding))
    }


def context_length(config: PretrainedConfig) -> int:
    """The positions a base has. Raises BaseRefused where it states none."""
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1:
        raise BaseRefused(
            "config.json states no max_position_embeddings: models that place tokens by ALiBi or recurrence cannot be "
            "served; use one with rotary or learnt positions (Llama, Mistral, Qwen, Gemma, GPT-2, ...)"
        )
    return stated


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is the plain map of its kind: routers of experts subclass nn.Linear and return a choice."""
    return type(module).forward is kind.forward


def _module_spec(name: str, module: nn.Module, *, is_embedding: bool) -> ModuleSpec | None:
    """What adapters may find at `name`; None for modules that no adapter can act on.

    The model's own embedding may scale its rows; another with a forward of its own is called as its model likes.
    """
    kind: ModuleKind
    if isinstance(module, Linear4bit):
        kind = "conv1d" if getattr(module, "source_cls", None) is Conv1D else "linear"
        state = module.weight.quant_state  # none where the weight has no memory
        out_features, in_features = module.weight.shape if state is None else state.shape
    elif isinstance(module, nn.Linear) and _computes_as(module, nn.Linear):
        kind, out_features, in_features = "linear", module.out_features, module.in_features
    elif isinstance(module, Conv1D) and _computes_as(module, Conv1D):
        kind, (in_features, out_features) = "conv1d", module.weight.shape
    elif isinstance(module, nn.Embedding) and (is_embedding or _computes_as(module, nn.Embedding)):
        kind, in_features, out_features = "embedding", module.num_embeddings, module.embedding_dim
    elif isinstance(module, nn.Linear | Conv1D | nn.Embedding):
        return None
    elif (weight := dict(module.named_parameters(recurse=False)).get("weight")) is not None and weight.dim() == 1:
        kind, in_features, out_features = "norm", weight.numel(), weight.numel()
    else:
        return None
    return ModuleSpec(name, kind, int(in_features), int(out_features), getattr(module, "bias", None) is not None)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts every floating parameter but the NF4 weights; buffers (rotary frequencies) keep their float32."""
    quantized = {id(m.weight) for m in model.modules() if isinstance(m, Linear4bit)}
    for parameter in model.parameters():
        if id(parameter) not in quantized and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            # The backward pass dequantizes to the state's own dtype: the checkpoint's, until here.
            module.weight.quant_state.dtype = dtype
