"""What a base's configuration tells without its weights: the names of its modules, its vocabulary, its context.

The model is built on the meta device, where tensors have shapes and no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from loramux_adapters.base.load import context_length, model_id, module_specs, refuse_foreign_quantization
from loramux_adapters.spec import ModuleSpec


@dataclass(frozen=True)
class BaseOutline:
    """A part of what BaseModelSpec says, under the same names, and the generation settings."""

    model_id: str
    vocab_size: int
    context_length: int
    head: str | None
    modules: Mapping[str, ModuleSpec] = field(repr=False)
    generation: Any = field(repr=False)


def read_outline(source: str | Path, *, name: str | None = None) -> BaseOutline:
    """The outline of a hub id or directory, called `name` if given.

    Raises OSError, ValueError and BaseRefused, as its load would.
    """
    source = str(source)
    config_json, _ = PretrainedConfig.get_config_dict(source)
    refuse_foreign_quantization(config_json)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names = {id(module): name for name, module in model.named_modules()}
    text = model.config.get_text_config()
    return BaseOutline(
        model_id=model_id(name or source),
        vocab_size=text.vocab_size,
        context_length=context_length(text),
        head=names.get(id(model.get_output_embeddings())),
        modules=module_specs(model),
        generation=_generation(source, model),
    )


def _generation(source: str, model: Any) -> Any:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:  # most checkpoints have none: what their config says is in the model
        return model.generation_config
