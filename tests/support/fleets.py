"""Small fleets on the embedded base, and PEFT beside them in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from loramux_adapters.base.bitsandbytes_compat import Linear4bit
from loramux_adapters.base.frozen import Nf4Linear, logical_nf4
from loramux_adapters.base.load import LoadedBase
from loramux_adapters.formats.peft.writer import write_files
from loramux_trainer.batches import StepOrder
from loramux_trainer.data.examples import IGNORE, Example, Unit
from loramux_trainer.data.records import parse_record
from loramux_trainer.fleet.member import Member, MemberOptions
from loramux_trainer.fleet.parameters import ParameterGroup
from loramux_trainer.losses.protocol import Loss
from loramux_trainer.losses.sft import SftLoss
from loramux_trainer.methods import low_rank
from loramux_trainer.methods.method import Method
from loramux_trainer.methods.rules import BaseValues
from loramux_trainer.methods.trained import TrainedAdapter
from loramux_trainer.optimizers.library import LibraryOptimizer, torch_groups
from support.tiny import conversation, tiny_encoder

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def torch_optimizer(
    make: type[torch.optim.Optimizer], groups: Sequence[ParameterGroup], **options: Any
) -> LibraryOptimizer:
    """A plain one of torch over a member's buffers."""
    return LibraryOptimizer(make(torch_groups(groups, 0.0, None), lr=1e-3, **options))


def examples_of(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[Example]:
    encoder = tiny_encoder(tokenizer)
    return [example for pair in texts for example in encoder.encode(parse_record({"messages": conversation(*pair)}))]


def various_units(tokenizer: Any, count: int, *, pairs: bool = False, labels: bool = False) -> list[Unit]:
    """Of different lengths."""
    texts = [(f"word{i} " * (1 + i % 4), f"answer{i * 7 % 13}" * (1 + i % 3)) for i in range(count)]
    examples = examples_of(tokenizer, texts)
    if pairs:
        return [Unit((examples[i], examples[(i + 3) % count])) for i in range(count)]
    return [Unit((example,), bool(i % 2) if labels else None) for i, example in enumerate(examples)]


def lora_config(rank: int = 4, **options: Any) -> dict[str, Any]:
    return {"task_type": "CAUSAL_LM", "target_modules": ALL_LINEAR, "r": rank, "lora_alpha": 2 * rank, **options}


def make_member(
    base: LoadedBase,
    units: Sequence[Unit],
    *,
    name: str = "member",
    method: Method | None = None,
    rank: int = 4,
    loss: Loss | None = None,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    steps: int = 20,
    seed: int = 0,
    dropout: float = 0.0,
    batch_size: int = 3,
    accumulation: int = 1,
    held_out: Sequence[Unit] = (),
    rate: float = 1e-3,
    chunk_tokens: int = 2048,
) -> Member:
    method = method or low_rank.lora(lora_config(rank), seed, BaseValues(base))
    order = StepOrder([unit.tokens for unit in units], batch_size=batch_size, accumulation=accumulation, seed=seed)
    options = MemberOptions(
        steps, lambda step: rate, dropout=dropout, seed=seed, chunk_tokens=chunk_tokens, max_grad_norm=1.0
    )
    return Member(
        name,
        TrainedAdapter(method, base.spec, base.device),
        loss or SftLoss(),
        lambda groups: torch_optimizer(optimizer, groups),
        order,
        units,
        held_out,
        options,
    )


def jitter(adapter: TrainedAdapter, by: float = 0.02) -> None:
    """Moves all trained numbers, so that nothing is zero."""
    generator = torch.Generator().manual_seed(11)
    weights = adapter.parameters.weights
    weights.add_(by * torch.randn(weights.shape, generator=generator))


def name_in_file(adapter: TrainedAdapter, name: str) -> str:
    """What the file calls a trained tensor that is exported as it is."""
    module, role = name.split(":")
    return adapter.layout.name(module, role)


def dequantize(model: torch.nn.Module) -> None:
    """Plain linear maps in place of the 4-bit ones, with the very weights."""
    for name, module in [pair for pair in model.named_modules() if isinstance(pair[1], Linear4bit)]:
        plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        frozen = Nf4Linear(*logical_nf4(module), None, torch.float32)
        plain.weight = torch.nn.Parameter(frozen.dequantize(torch.float32), requires_grad=False)
        if module.bias is not None:
            plain.bias = module.bias
        model.set_submodule(name, plain)


def peft_in_float64(adapter: TrainedAdapter, base: LoadedBase, plain: Any, directory: Path) -> Any:
    """What PEFT makes of the exported files on `plain`, a float model, trainable and in float64."""
    config, tensors = adapter.files()
    write_files(directory, config | {"base_model_name_or_path": "base"}, tensors, base.spec.fingerprint)
    dequantize(plain)
    if config["peft_type"] in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"):  # PEFT loads no trainable ones
        parsed = PeftConfig.from_pretrained(str(directory))
        parsed.inference_mode = False
        model = get_peft_model(plain, parsed)
        rows = load_file(directory / "adapter_model.safetensors")["prompt_embeddings"]
        model.prompt_encoder["default"].embedding.weight.data.copy_(rows)
    else:
        model = PeftModel.from_pretrained(plain, str(directory), is_trainable=True)
    torch.nn.Module.to(model, torch.float64)
    return model


def summed_loss(model: Any, examples: Sequence[Example]) -> torch.Tensor:
    """Sum over supervised tokens, sequence by sequence."""
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids, labels = torch.tensor([example.ids]), torch.tensor([example.labels])
        count = int((labels[:, 1:] != IGNORE).sum())
        total = total + model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss * count
    return total
