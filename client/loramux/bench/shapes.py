"""Model shapes with random weights: checkpoints and adapters written once into a cache directory.

A bench of speed needs a shape, not knowledge. Everything follows from the seed; torch and transformers load
inside the functions.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.bench.workload import AdapterPlan, WorkloadInvalid

if TYPE_CHECKING:
    import torch

_LAYOUT = 2  # part of the cache key: raise it when what is written changes


@dataclass(frozen=True)
class Shape:
    """A Llama architecture; head size is hidden / heads."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    context: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """The seven linears of a layer: name -> (in_features, out_features)."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.hidden, kv),
            "self_attn.v_proj": (self.hidden, kv),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.hidden, self.intermediate),
            "mlp.up_proj": (self.hidden, self.intermediate),
            "mlp.down_proj": (self.intermediate, self.hidden),
        }

    def targets(self) -> list[str]:
        """The linears' own names, as PEFT selects them."""
        return sorted(site.rpartition(".")[2] for site in self.linears())

    def rank_row_weights(self) -> int:
        """Numbers of one rank row in every linear, the head's among them: what a unit of rank takes on the device."""
        return sum(map(sum, self.linears().values())) * self.layers + self.hidden + self.vocabulary


SHAPES: Mapping[str, Shape] = {
    "125m": Shape(hidden=768, layers=12, heads=12, kv_heads=4, intermediate=2048, vocabulary=32000, context=2048),
    "tiny": Shape(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=256, vocabulary=1024, context=512),
}


def get_shape(name: str) -> Shape:
    """The shape of that name. Raises WorkloadInvalid."""
    if name not in SHAPES:
        raise WorkloadInvalid(f"shape: there is no {name!r}; known are {', '.join(SHAPES)}")
    return SHAPES[name]


def make_checkpoint(name: str, seed: int, cache: Path) -> Path:
    """Directory of a Hugging Face checkpoint of the shape, bfloat16, made on the first call."""
    shape = get_shape(name)
    target = cache / f"{name}-seed{seed}-v{_LAYOUT}"
    if target.is_dir():
        return target

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    with published(target) as folder:
        model.save_pretrained(folder)
        _tokenizer(shape.vocabulary).save_pretrained(folder)
    return target


def make_adapters(name: str, plan: AdapterPlan, count: int, seed: int, cache: Path) -> list[Path]:
    """PEFT directories of `count` random adapters on all seven linears of every layer, made on the first call."""
    return [make_adapter(name, plan, number, seed, cache) for number in range(count)]


def make_adapter(name: str, plan: AdapterPlan, number: int, seed: int, cache: Path) -> Path:
    """The one with that number."""
    path = adapters_root(name, plan, seed, cache) / f"bench-r{plan.rank}-{number:03d}"
    if not path.is_dir():
        _write_adapter(get_shape(name), plan, seed * 1_000_000 + number, path)
    return path


def adapters_root(name: str, plan: AdapterPlan, seed: int, cache: Path) -> Path:
    """Where adapters of a plan are: one directory for each way of making them."""
    return cache / f"{name}-adapters-r{plan.rank}-a{plan.alpha:g}-{plan.dtype}-seed{seed}-v{_LAYOUT}"


def _write_adapter(shape: Shape, plan: AdapterPlan, seed: int, path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    dtype: torch.dtype = getattr(torch, plan.dtype)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(shape.layers):
        for site, (width_in, width_out) in shape.linears().items():
            prefix = f"base_model.model.model.layers.{layer}.{site}"
            a = torch.randn(plan.rank, width_in, generator=generator) * width_in**-0.5  # [r, in]
            b = torch.randn(width_out, plan.rank, generator=generator) * 0.01  # [out, r]: not zero, so it acts
            tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = a.to(dtype), b.to(dtype)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": plan.rank,
        "lora_alpha": plan.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": shape.targets(),
    }
    with published(path) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """A temporary directory that takes its final name at the end, so that no half-written one is ever found."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        yield folder
        with suppress(OSError):  # another run made the same content meanwhile
            os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tokenizer(vocabulary: int) -> Any:
    """A byte-level BPE of exactly that size: every byte, then the first pairs of bytes in order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    wanted = vocabulary - len(special) - len(alphabet)
    pairs = [(left, right) for left in alphabet for right in alphabet][: max(0, wanted)]
    tokens = [*special, *alphabet, *(left + right for left, right in pairs)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[2]
    )
