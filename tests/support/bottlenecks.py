"""Bottleneck adapters in AdapterHub's format, and a reference that follows adapters 1.3.0 line by line.

The package needs an older transformers than ours, so it has an environment of its own; see `adapterhub_package`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from loramux_adapters.adapter_files import ADAPTERHUB_WEIGHTS_FILE, CONFIG_FILE

NAME = "task"
HOOKED = ("gemma2", "gemma3_text", "qwen2", "qwen3")
"""Architectures whose projections the package hooks; in others it has layers of its own."""

# BnConfig's defaults and its presets: what save_adapter writes under "config", whole.
_DEFAULTS = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
    "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
    "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False,
    "learn_phm": True, "leave_out": [], "ln_after": False, "ln_before": False, "original_ln_after": True,
    "original_ln_before": False, "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001,
    "phm_layer": False, "phm_rank": 1, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False,
    "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
_MLP, _BOTH = {"mh_adapter": False, "output_adapter": True}, {"mh_adapter": True, "output_adapter": True}
SEQ_BN = {**_MLP, "original_ln_before": True, "non_linearity": "relu", "reduction_factor": 16}
DOUBLE_SEQ_BN = {**_BOTH, "non_linearity": "swish", "reduction_factor": 16}
PAR_BN = {
    **_MLP, "non_linearity": "relu", "reduction_factor": 2, "init_weights": "mam_adapter", "is_parallel": True,
    "scaling": 4.0,
}  # fmt: skip
ADAPTER_PLUS = {
    **_MLP, "original_ln_after": False, "original_ln_before": True, "residual_before_ln": False,
    "stochastic_depth": 0.1, "init_weights": "houlsby", "scaling": "channel", "reduction_factor": 96,
    "non_linearity": "gelu",
}  # fmt: skip

_EVERYWHERE: dict[str, dict[str, Any]] = {
    "seq_bn": SEQ_BN,
    "double_seq_bn": DOUBLE_SEQ_BN,
    "par_bn": PAR_BN,
    "scaled_par_bn": {**PAR_BN, "scaling": "learned"},
    "attention only": {**SEQ_BN, **_BOTH, "output_adapter": False, "non_linearity": "tanh", "reduction_factor": 20},
    "par_bn of attention": {**PAR_BN, **_BOTH, "non_linearity": "leakyrelu", "reduction_factor": 9.5},
    "one layer": {**DOUBLE_SEQ_BN, "leave_out": [0], "non_linearity": "gelu_new"},
    "layer by layer": {**SEQ_BN, "reduction_factor": {"1": 8, "default": 400}, "non_linearity": "gelu"},
    "wider than the base": {**SEQ_BN, "reduction_factor": 0.8, "non_linearity": "quick_gelu"},
    "channels": {**DOUBLE_SEQ_BN, "scaling": "channel", "non_linearity": "silu"},
    "twice the residual": {**SEQ_BN, "residual_before_ln": False, "non_linearity": "mish"},
    "norm before": {**DOUBLE_SEQ_BN, "ln_before": True},
    "norm after": {**SEQ_BN, "ln_after": True, "scaling": 3.5},
    "norm after the residual": {**SEQ_BN, **_BOTH, "ln_after": True, "adapter_residual_before_ln": True},
    "both norms": {**PAR_BN, "ln_before": True, "ln_after": True, "scaling": "learned"},
}
_OWN_LAYERS_ONLY = {
    "adapter_plus": ADAPTER_PLUS,
    "no residual of the layer's": {**SEQ_BN, "original_ln_after": False},
    "residual in the norm alone": {
        **ADAPTER_PLUS, "ln_after": True, "adapter_residual_before_ln": True, "reduction_factor": 16,
    },
    "parallel without residual": {**PAR_BN, **_BOTH, "original_ln_after": False},
}  # fmt: skip


def variants(architecture: str) -> dict[str, dict[str, Any]]:
    """Every option that the package has a meaning for in layers of an architecture."""
    if architecture not in HOOKED:
        return _EVERYWHERE | _OWN_LAYERS_ONLY
    if not architecture.startswith("gemma"):
        return _EVERYWHERE
    # Its outputs are normalized, in the package by the last layer's norm in all layers.
    return {
        name: options
        for name, options in _EVERYWHERE.items()
        if options.get("is_parallel") or not options.get("original_ln_before")
    }


class _Adapter(nn.Module):
    """`methods/modeling.py`: Adapter, ParallelAdapter, their modules under their names."""

    def __init__(self, width: int, k: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        act = config["non_linearity"].lower()
        down: list[nn.Module] = []
        if config["ln_before"]:
            self.adapter_norm_before = nn.LayerNorm(width)
            down.append(self.adapter_norm_before)
        down.append(nn.Linear(width, k))
        down.append(nn.LeakyReLU() if act == "leakyrelu" else ACT2FN[act])
        self.adapter_down = nn.Sequential(*down)
        self.adapter_up = nn.Linear(k, width)
        self.scaling: Any = config["scaling"]
        if self.scaling == "learned":
            self.scaling = nn.Parameter(torch.ones(1))
        elif self.scaling == "channel":
            self.scaling = nn.Parameter(torch.ones(width))
        if config["ln_after"]:
            self.adapter_norm_after = nn.LayerNorm(width)

    def _sequential(self, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        config, x = self.config, y
        shortcut = y if config["residual_before_ln"] is True else None
        if config["original_ln_before"]:
            x = y + residual
        if shortcut is None:
            shortcut = x
        output = self.adapter_up(self.adapter_down(x)) * self.scaling
        if config["adapter_residual_before_ln"]:
            output = output + shortcut
        if config["ln_after"]:
            output = self.adapter_norm_after(output)
        if not config["adapter_residual_before_ln"]:
            output = output + shortcut
        return output

    def _parallel(self, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        output = self.adapter_up(self.adapter_down(residual)) * self.scaling
        if self.config["ln_after"]:
            output = self.adapter_norm_after(output)
        return output + y

    def forward(self, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """What the adapter gives for a sub-layer's output, before a residual is added."""
        return self._parallel(y, residual) if self.config["is_parallel"] else self._sequential(y, residual)


class _Layer(nn.Module):
    """`methods/bottleneck.py`: BottleneckLayer, with one adapter or none."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()

    def hidden(self, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The residual stream after the sub-layer, in the package's own layers."""
        for adapter in self.adapters.values():
            output = adapter(y, residual)
            return output + residual if adapter.config["original_ln_after"] else output
        return y + residual

    def hooked(self, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The projection's output, where it is hooked."""
        for adapter in self.adapters.values():
            return adapter(y, residual)
        return y


def attach(model: PreTrainedModel, config: dict[str, Any], name: str = NAME) -> PreTrainedModel:
    """The model with adapters of a config, untrained, where the package puts them."""
    architecture = model.config.model_type
    is_gpt2, is_gemma = architecture == "gpt2", architecture.startswith("gemma")
    layers = model.transformer.h if is_gpt2 else model.model.layers
    for index, layer in enumerate(layers):
        layer.attention_adapters, layer.output_adapters = _Layer(), _Layer()
        for key, place in (("mh_adapter", layer.attention_adapters), ("output_adapter", layer.output_adapters)):
            if config[key] and index not in config["leave_out"]:
                reduction = config["reduction_factor"]
                if isinstance(reduction, dict):
                    reduction = reduction.get(str(index), reduction.get("default"))
                width = model.config.hidden_size
                place.adapters[name] = _Adapter(width, max(1, int(width // reduction)), config)
        if architecture in HOOKED:
            second = layer.pre_feedforward_layernorm if is_gemma else layer.post_attention_layernorm
            _hook(layer.input_layernorm, layer.self_attn.o_proj, layer.attention_adapters)
            _hook(second, layer.mlp.down_proj, layer.output_adapters)
        else:
            names = (
                ("ln_1", "attn", "ln_2") if is_gpt2 else ("input_layernorm", "self_attn", "post_attention_layernorm")
            )
            _replace_forward(layer, *names)
    return model.eval()


def _hook(norm: nn.Module, projection: nn.Module, place: _Layer) -> None:
    kept: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
    projection.register_forward_hook(lambda _module, _args, output: place.hooked(output, kept.pop()))


def _replace_forward(layer: Any, norm: str, attention: str, second_norm: str) -> None:
    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output, _ = getattr(layer, attention)(getattr(layer, norm)(hidden_states), *args, **kwargs)
        hidden_states = layer.attention_adapters.hidden(output, hidden_states)
        output = layer.mlp(getattr(layer, second_norm)(hidden_states))
        hidden: torch.Tensor = layer.output_adapters.hidden(output, hidden_states)
        return hidden

    layer.forward = forward


def full_config(architecture: str, hidden_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """adapter_config.json."""
    return {
        "config": _DEFAULTS | options,
        "hidden_size": hidden_size,
        "model_class": "Model",
        "model_name": "base",
        "model_type": architecture,
        "name": NAME,
        "version": "adapters.1.3.0",
    }


def randomized(model: nn.Module, seed: int, std: float = 0.1) -> None:
    """Moves every tensor of the adapter by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".adapters.{NAME}." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def make_bottleneck(model: PreTrainedModel, out: Path, options: dict[str, Any], *, seed: int) -> Path:
    """A directory as save_adapter(..., use_safetensors=True) writes it; `model` has adapters afterwards."""
    config = full_config(model.config.model_type, model.config.hidden_size, options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        attach(model, config["config"])
    randomized(model, seed)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if f".adapters.{NAME}." in name}
    out.mkdir(parents=True)
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True))
    save_file(tensors, out / ADAPTERHUB_WEIGHTS_FILE)
    return out


def is_bottleneck(directory: Path) -> bool:
    """Whether it is one of AdapterHub's."""
    return (directory / ADAPTERHUB_WEIGHTS_FILE).exists()


def with_bottlenecks(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """The model with the adapter of a directory, every tensor of the file in its place. As in the package, keys that
    its config does not have are the defaults.
    """
    config = json.loads((directory / CONFIG_FILE).read_text())
    attach(model, _DEFAULTS | config["config"], config["name"])
    found = model.load_state_dict(load_file(directory / ADAPTERHUB_WEIGHTS_FILE), strict=False)
    assert not found.unexpected_keys
    assert not [name for name in found.missing_keys if ".adapters." in name]
    return model
