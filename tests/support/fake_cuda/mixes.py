"""Every mix of work a step may have, run on the fake device: name -> the ledger of the step that stands for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from loramux_adapters.base.load import load_base
from loramux_adapters.parts.input_gain import InputGain
from loramux_adapters.parts.output_gain import OutputGain
from loramux_adapters.spec import BaseModelSpec
from loramux_adapters.weights import AdapterWeights, ModuleWeights
from loramux_server.engine.plan import StepPlan
from loramux_server.requests import SamplingParams
from support.checkpoints import make_adapter_for, save_checkpoint, wide_model
from support.fake_cuda.engine import FakeCudaEngine
from support.fake_cuda.ledger import Ledger, Place

LAYERS = 2
ROWS = 8
GREEDY = SamplingParams(temperature=0.0)
SAMPLINGS = (
    SamplingParams(temperature=0.0, prompt_logprobs=2),
    SamplingParams(temperature=0.8, seed=1, top_p=0.9, top_k=40, logprobs=3, prompt_logprobs=0),
    SamplingParams(temperature=1.0, seed=2, min_p=0.1, repetition_penalty=1.2, frequency_penalty=0.5),
    SamplingParams(temperature=0.0, presence_penalty=0.3, logit_bias={5: 2.0, 11: -100.0}, logprobs=2),
)
Steps = list[tuple[StepPlan, Ledger]]


class Mixes:
    """One checkpoint of Qwen2 (it has biases) and its adapters; each mix has an engine of its own."""

    def __init__(self, root: Path) -> None:
        self._checkpoint = save_checkpoint(wide_model("qwen2", num_hidden_layers=LAYERS), root / "base")
        self._adapters = {
            name: make_adapter_for(self._checkpoint, root / name, seed=index, **options)
            for index, (name, options) in enumerate(
                {
                    "a": {"r": 4, "target_modules": "all-linear"},
                    "b": {"r": 8, "target_modules": "all-linear"},
                    "c": {"r": 16, "target_modules": ["q_proj", "v_proj"]},
                    "parts": {"r": 8, "bias": "all", "target_modules": ["q_proj", "o_proj", "embed_tokens", "lm_head"]},
                }.items()
            )
        }

    def measure(self) -> Iterator[tuple[str, Ledger]]:
        """(name, ledger) of each mix. Raises StepFailed where a step cannot run on CUDA."""
        steps = self._steps((None, "a", "b", "c"), later=(None, "a"))
        yield "prefill", last(steps, is_prefill)
        yield "decode", last(steps[:3], is_decode)
        yield "prefill and decode", last(steps, is_mixed)
        steps = self._steps((None,), later=("parts",))
        yield "decode, base only", last(steps[:3], is_decode)
        yield "decode, an adapter is copied", max_of(steps, lambda ledger: ledger.to_device, is_decode)
        yield "decode, an adapter is bound", last(steps, lambda plan: bool(plan.bind))
        steps = self._steps(("parts", None, "a"))
        yield "prefill, all parts", last(steps, is_prefill)
        yield "decode, all parts", last(steps, is_decode)
        steps = self._steps(("a",), merged="a")
        yield "decode, one adapter", last(steps[:3], is_decode)
        yield "decode, an adapter is merged", max_of(steps[3:], lambda ledger: ledger.kernels, is_decode)
        yield "decode, merged", last(steps, lambda plan: plan.merged is not None)
        steps = self._steps((None, "a", "b", "c"), deterministic=True)
        yield "prefill, deterministic", last(steps, is_prefill)
        yield "decode, deterministic", last(steps, is_decode)
        steps = self._steps((None, "a", "b", "c"), samplings=SAMPLINGS)
        yield "prefill, prompt logprobs", last(steps, is_prefill)
        yield "decode, sampling", last(steps, is_decode)

    def _steps(
        self,
        adapters: Sequence[str | None],
        *,
        samplings: Sequence[SamplingParams] = (GREEDY,),
        later: Sequence[str | None] = (),
        merged: str | None = None,
        **options: Any,
    ) -> Steps:
        """ROWS requests, their adapters resident: three steps; then three more with requests of `later`, or as many as
        it takes to merge `merged`, and one.
        """
        engine = Engine(load_base(self._checkpoint, compute_dtype=torch.bfloat16), self._adapters, **options)

        def submit(index: int, adapter: str | None, count: int) -> None:
            prompt = [index, *range(100, 112)]  # no prefix of another's
            engine.submit(adapter, prompt, count, sampling=samplings[index % len(samplings)])

        for index, adapter in enumerate(dict.fromkeys(adapters)):
            submit(50 + index, adapter, 1)
        engine.run()
        engine.counted.steps.clear()
        for index in range(ROWS):
            submit(index, adapters[index % len(adapters)], 30)
        for _ in range(3):
            engine.step()
        for index, adapter in enumerate(later, ROWS):
            submit(index, adapter, 30)
        if merged is not None:
            engine.merged_weights.reconcile(frozenset({engine.digests[merged]}))
            engine.settle_merges()
        for _ in range(3 if later else 1):
            engine.step()
        return engine.counted.steps


class Engine(FakeCudaEngine):
    """Its adapter of biases has gains too, which no file format brings yet."""

    def read(self, path: Path, base: BaseModelSpec) -> AdapterWeights:
        """See ModelEngine."""
        weights = super().read(path, base)
        if path.name != "parts":
            return weights
        modules = dict(weights.modules)
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            spec = base.modules[name]
            with unset_fake_temporarily():
                gains = (InputGain(torch.ones(spec.in_features)), OutputGain(torch.ones(spec.out_features)))
            modules[name] = ModuleWeights((*(modules[name].parts if name in modules else ()), *gains))
        return AdapterWeights(weights.spec, modules)


def is_prefill(plan: StepPlan) -> bool:
    """Prompts only."""
    return bool(plan.chunks) and not plan.bind and all(len(chunk.tokens) > 1 for chunk in plan.chunks)


def is_decode(plan: StepPlan) -> bool:
    """Rows of one token only, nothing bound, nothing merged."""
    decodes = len(plan.chunks) >= ROWS and all(len(chunk.tokens) == 1 for chunk in plan.chunks)
    return decodes and not plan.bind and plan.merged is None


def is_mixed(plan: StepPlan) -> bool:
    """Both, nothing bound."""
    sizes = [len(chunk.tokens) for chunk in plan.chunks]
    return not plan.bind and 1 in sizes and max(sizes) > 1


def last(steps: Steps, is_it: Callable[[StepPlan], bool]) -> Ledger:
    """Of the last step that is of the mix."""
    return [ledger for plan, ledger in steps if is_it(plan)][-1]


def max_of(steps: Steps, of: Callable[[Ledger], Counter[Place]], is_it: Callable[[StepPlan], bool]) -> Ledger:
    """Of the step of the mix that has most."""
    return max((ledger for plan, ledger in steps if is_it(plan)), key=lambda ledger: of(ledger).total())
