"""Adapters of every kind, made by PEFT itself, and PEFT as the oracle on the dequantized base."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramux_adapters.base.frozen import Nf4Linear
from support.adapters import peft_warnings_ignored, save
from support.against_peft import Truth
from support.bottlenecks import is_bottleneck, with_bottlenecks
from support.checkpoints import float_base


def dequantized_model(checkpoint: Path) -> PreTrainedModel:
    """The checkpoint's own model, its linear weights replaced by what their NF4 codes stand for: PEFT has layers for
    quantized modules in some of its methods only."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(checkpoint), dtype=torch.float32)
    base = float_base(checkpoint)
    for name, spec in base.spec.modules.items():
        quantized, module = base.model.get_submodule(name), model.get_submodule(name)
        if spec.kind in ("linear", "conv1d") and hasattr(quantized.weight, "quant_state"):
            weight = Nf4Linear.from_module(quantized, torch.float32).dequantize(torch.float32)
            with torch.no_grad():
                module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)
    return model.eval()


@functools.lru_cache(maxsize=1)
def pristine_model(checkpoint: Path) -> PreTrainedModel:
    """`dequantized_model`, kept for the next call: copy it before you change it."""
    return dequantized_model(checkpoint)


def make_kind(
    checkpoint: Path,
    out: Path,
    config: PeftConfig,
    *,
    seed: int,
    std: float = 0.05,
    vocabulary: int | None = None,
    **options: Any,
) -> Path:
    """A PEFT directory of `config` on the checkpoint; every trained tensor is moved by noise, so that none is zero.

    With `vocabulary` the checkpoint is resized to it first; `options` are save_pretrained's.
    """
    model = copy.deepcopy(pristine_model(checkpoint))
    with peft_warnings_ignored(), torch.random.fork_rng():
        torch.manual_seed(seed)
        if vocabulary is not None:
            _resize(model, vocabulary)
        wrapped = get_peft_model(model, copy.deepcopy(config))
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * std)
    return save(wrapped, out, **options)


def _resize(model: PreTrainedModel, vocabulary: int) -> None:
    """New rows are twice as large as the old ones, so that new tokens are drawn."""
    before = model.config.vocab_size
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    with torch.no_grad():
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            if vocabulary > before:
                table[before:] = torch.randn_like(table[before:]) * table[:before].std() * 2


class KindOracle:
    """PEFT alone, or the reference of AdapterHub's, one adapter at a time, in float32: recomputes the whole sequence
    per token.
    """

    def __init__(
        self,
        checkpoint: Path,
        adapter: Path | None,
        vocabulary: int | None = None,
        model: PreTrainedModel | None = None,
    ) -> None:
        """On `model` in place of the checkpoint's own where it is given; it is changed.

        `vocabulary` is what the base has to be resized to before PEFT can load the adapter.
        """
        self.model: Any = dequantized_model(checkpoint) if model is None else model
        if vocabulary is not None:
            self.model.resize_token_embeddings(vocabulary, mean_resizing=False)
        if adapter is not None and is_bottleneck(adapter):
            self.model = with_bottlenecks(self.model, adapter)
        elif adapter is not None:
            with peft_warnings_ignored():
                self.model = PeftModel.from_pretrained(self.model, str(adapter)).eval()

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[len(tokens), vocab] float32."""
        with peft_warnings_ignored():
            logits: torch.Tensor = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        return logits[0, -len(tokens) :].float()

    def truth(self, adapter: str | None, prompt: list[int], count: int) -> Truth:
        """`count` greedy tokens after the prompt, and what predicted them."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return Truth(adapter, prompt, tokens[len(prompt) :], self.logits(tokens)[len(prompt) - 1 : -1])


def ask_oracle(
    checkpoint: Path,
    adapters: Mapping[str, Path],
    rows: list[tuple[str | None, list[int]]],
    count: int = 4,
    vocabularies: Mapping[str, int] = MappingProxyType({}),
) -> list[Truth]:
    """`count` greedy tokens for each (adapter, prompt), adapter by adapter; `vocabularies` of those that resized it."""
    found: dict[int, Truth] = {}
    for wanted in dict.fromkeys(name for name, _ in rows):
        vocabulary = None if wanted is None else vocabularies.get(wanted)
        oracle = KindOracle(checkpoint, None if wanted is None else adapters[wanted], vocabulary)
        for index, (name, prompt) in enumerate(rows):
            if name == wanted:
                found[index] = oracle.truth(name, prompt, count)
    return [found[index] for index in range(len(rows))]


def assert_each_changes_what_is_said(checkpoint: Path, truths: Sequence[Truth]) -> None:
    """The first token of each adapter's answer, beside the base's to the same prompt."""
    adapted = [truth for truth in truths if truth.adapter is not None]
    bases = ask_oracle(checkpoint, {}, [(None, truth.prompt) for truth in adapted], count=1)
    for truth, base in zip(adapted, bases, strict=True):
        apart = float((truth.logits[0] - base.logits[0]).abs().max() / base.logits[0].std())
        assert apart > 0.01, truth.adapter


def targets_of(architecture: str, *leaves: str) -> dict[str, Any]:
    """Options that select the attention's and the MLP's projections of a model family."""
    names = {"gpt2": ["c_attn", "c_fc"]}.get(architecture, ["q_proj", "v_proj", "down_proj"])
    return {"target_modules": list(leaves) or names}
