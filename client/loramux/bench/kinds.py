"""One random adapter of every kind that Loramux serves, on a shape of the bench; PEFT writes the directories.

What a kind costs depends on its sizes and not on its values: all of a method's trained tensors are moved by noise.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.bench.shapes import Shape, adapters_root, get_shape, make_adapter, published
from loramux.bench.workload import ALORA, INVOCATION, LORA, AdapterPlan, Member, Workload, WorkloadInvalid

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

_NOISE = 0.02
_REDUCTION = 16  # of a bottleneck: hidden size over its width
_VIRTUAL_TOKENS = 8
_DENSE_BLOCK = 32  # of OFT


def _low_rank(method: str, **options: Any) -> Callable[[Shape, int], PeftConfig]:
    def config(shape: Shape, rank: int) -> PeftConfig:
        import peft

        return getattr(peft, method)(r=rank, target_modules=shape.targets(), task_type="CAUSAL_LM", **options)

    return config


def _other(method: str, **options: Any) -> Callable[[Shape, int], PeftConfig]:
    def config(shape: Shape, rank: int) -> PeftConfig:
        import peft

        return getattr(peft, method)(task_type="CAUSAL_LM", **options)

    return config


def _ia3(shape: Shape, rank: int) -> PeftConfig:
    import peft

    return peft.IA3Config(target_modules=shape.targets(), feedforward_modules=["down_proj"], task_type="CAUSAL_LM")


def _oft(shape: Shape, rank: int) -> PeftConfig:
    import peft

    return peft.OFTConfig(target_modules=shape.targets(), oft_block_size=_DENSE_BLOCK, task_type="CAUSAL_LM")


KINDS: Mapping[str, Callable[[Shape, int], PeftConfig]] = {
    "dora": _low_rank("LoraConfig", use_dora=True),
    ALORA: _low_rank("LoraConfig", alora_invocation_tokens=list(INVOCATION)),
    "tokens": _low_rank("LoraConfig", trainable_token_indices=list(range(100, 164))),
    "head": _low_rank("LoraConfig", modules_to_save=["lm_head"]),
    "loha": _low_rank("LoHaConfig"),
    "lokr": _low_rank("LoKrConfig"),
    "hra": _low_rank("HRAConfig"),
    "vera": _low_rank("VeraConfig", save_projection=True),
    "ia3": _ia3,
    "norms": _other("LNTuningConfig", target_modules=["input_layernorm", "post_attention_layernorm"]),
    "prompt": _other("PromptTuningConfig", num_virtual_tokens=_VIRTUAL_TOKENS),
    "prefix": _other("PrefixTuningConfig", num_virtual_tokens=_VIRTUAL_TOKENS),
    "oft": _oft,
}
"""Configs by kind: of a shape and a rank, where the method has one. All low ranks on all linears."""

BOTTLENECK = "bottleneck"
"""The kind that is not PEFT's but AdapterHub's."""


def make_members(workload: Workload, checkpoint: Path, cache: Path) -> list[Path]:
    """Directories of `workload.members`, each made on the first call. Raises WorkloadInvalid for an unknown kind."""
    known = (LORA, *KINDS, BOTTLENECK)
    unknown = [member.kind for member in workload.members if member.kind not in known]
    if unknown:
        raise WorkloadInvalid(f"kinds: there is no {unknown[0]!r}; known are {', '.join(known)}")
    return [_make(member, workload, checkpoint, cache) for member in workload.members]


def _make(member: Member, workload: Workload, checkpoint: Path, cache: Path) -> Path:
    plan = AdapterPlan(member.rank, workload.adapters.alpha, workload.adapters.dtype)
    if member.kind == LORA:
        return make_adapter(workload.shape, plan, member.number, workload.seed, cache)
    shape, root = get_shape(workload.shape), adapters_root(workload.shape, plan, workload.seed, cache)
    path = root / f"bench-r{member.rank}-{member.kind}-{member.number:03d}"
    if not path.is_dir():
        with published(path) as folder:
            if member.kind == BOTTLENECK:
                _write_bottleneck(shape, folder, member.number)
            else:
                _write(checkpoint, KINDS[member.kind](shape, member.rank), folder, member.number)
    return path


def _write(checkpoint: Path, config: PeftConfig, folder: Path, seed: int) -> None:
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(checkpoint))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of PEFT, on options that do not matter for speed
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * _NOISE)
        wrapped.save_pretrained(folder)
    _forget_path(folder / "adapter_config.json")


def _forget_path(config: Path) -> None:
    """PEFT writes where the base was; a directory of this machine says nothing to a server."""
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"base_model_name_or_path": None}, indent=2) + "\n", encoding="utf-8")


def _write_bottleneck(shape: Shape, folder: Path, seed: int) -> None:
    """AdapterHub's `double_seq_bn` (Houlsby): after the attention and after the MLP of every layer."""
    import torch
    from safetensors.torch import save_file

    generator, width = torch.Generator().manual_seed(seed), shape.hidden // _REDUCTION
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(shape.layers):
        for place in ("attention_adapters", "output_adapters"):
            at = f"model.layers.{layer}.{place}.adapters.bench"
            for name, size in (("adapter_down.0", (width, shape.hidden)), ("adapter_up", (shape.hidden, width))):
                tensors[f"{at}.{name}.weight"] = torch.randn(size, generator=generator) * _NOISE
                tensors[f"{at}.{name}.bias"] = torch.randn(size[0], generator=generator) * _NOISE
    save_file(tensors, folder / "adapter.safetensors")
    config = {
        "config": {
            "mh_adapter": True,
            "output_adapter": True,
            "non_linearity": "swish",
            "reduction_factor": _REDUCTION,
            "original_ln_before": False,
            "original_ln_after": True,
        },
        "hidden_size": shape.hidden,
        "model_class": "LlamaForCausalLM",
        "model_name": "base",
        "model_type": "llama",
        "name": "bench",
        "version": "adapters.1.3.0",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
