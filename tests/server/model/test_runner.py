"""The runner beyond equivalence: prompt log-probabilities, one request's NaN, failures and memory in mid-step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loramux_server.engine.plan import DeviceLost
from loramux_server.model.forward_batch import ForwardBatch
from loramux_server.model.runner import ModelRunner
from loramux_server.model.sampler import Sampler
from loramux_server.requests import FinishReason, SamplingParams
from support.adapters import edit_tensors
from support.against_peft import Truth, ask_peft, assert_equal_to_peft, engine_for, prompts
from support.checkpoints import PeftOracle, make_adapter_for, save_checkpoint, wide_model
from support.model_engine import ModelEngine

ORDER = ["a", None, "b", "a", None, "b"]


class RunnerHarness:
    """A Llama with two sound adapters and an ill one: finite weights so large that its activations are not."""

    def __init__(self, root: Path) -> None:
        self.checkpoint = save_checkpoint(wide_model("llama"), root / "base")
        self.adapters = {
            "a": make_adapter_for(self.checkpoint, root / "a", seed=1, r=8, target_modules=["q_proj", "down_proj"]),
            "b": make_adapter_for(self.checkpoint, root / "b", seed=2, r=16, target_modules="all-linear"),
        }
        self.ill = make_adapter_for(self.checkpoint, root / "ill", seed=3, r=8, target_modules=["v_proj", "up_proj"])
        edit_tensors(self.ill, lambda tensors: {name: tensor * 1e25 for name, tensor in tensors.items()})
        rows = list(zip(ORDER, prompts(len(ORDER)), strict=True))
        self.truths = ask_peft(self.checkpoint, self.adapters, rows, count=6)

    def engine(self, **options: Any) -> ModelEngine:
        return engine_for(self.checkpoint, self.adapters | {"ill": self.ill}, **options)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> RunnerHarness:
    return RunnerHarness(tmp_path_factory.mktemp("runner"))


def submit(engine: ModelEngine, truths: list[Truth]) -> list[int]:
    return [engine.submit(truth.adapter, truth.prompt, len(truth.tokens)) for truth in truths]


@pytest.mark.parametrize("adapter", [None, "b"])
@pytest.mark.parametrize("batch_tokens", [2048, 64])
def test_prompt_logprobs_are_those_of_a_plain_forward(
    harness: RunnerHarness, adapter: str | None, batch_tokens: int
) -> None:
    engine = harness.engine(max_batch_tokens=batch_tokens, max_running=8)
    prompt = prompts(15)[14]
    assert len(prompt) > 64
    submit(engine, harness.truths)
    asked = SamplingParams(temperature=0.0, prompt_logprobs=2, logprobs=2)
    for _ in range(2):  # the second time there would be cached blocks
        ticket = engine.submit(adapter, prompt, 3, sampling=asked)
        engine.run()
        first = next(event for event in engine.events[ticket, 0] if event.prompt_logprobs is not None)
        found = first.prompt_logprobs
        oracle = PeftOracle(harness.checkpoint, None if adapter is None else harness.adapters[adapter])
        whole = prompt + engine.tokens(ticket)
        expected = oracle.logits(whole).log_softmax(-1)
        assert found is not None
        assert found[0] is None
        assert len(found) == len(prompt)
        for place, entry in enumerate(found[1:], start=1):
            row = expected[place - 1]
            assert entry is not None
            assert entry.token == prompt[place]
            assert entry.logprob == pytest.approx(float(row[prompt[place]]), abs=1e-4)
            best = row.topk(2)
            assert [token for token, _ in entry.top] == best.indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        drawn = [event.logprob for event in engine.events[ticket, 0] if event.logprob is not None]
        for offset, entry in enumerate(drawn):
            row = expected[len(prompt) + offset - 1]
            assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"deterministic": True, "prefill_chunk": 16}, {"max_batch_tokens": 24, "max_running": 10}, {"kv_blocks": 24}],
    ids=["plain", "deterministic", "chunked", "few blocks"],
)
def test_an_adapter_that_gives_nan_fails_alone(harness: RunnerHarness, options: dict[str, Any]) -> None:
    """And the blocks it leaves, NaN in every row, harm nobody who gets them next."""
    engine = harness.engine(**options)
    for _ in range(3):
        ill = [engine.submit("ill", prompt, 4) for prompt in prompts(3)]
        tickets = submit(engine, harness.truths)
        engine.run()
        for ticket in ill:
            failure = engine.events[ticket, 0][-1].failure
            assert failure is not None
            assert failure.code == "NUMERIC"
            assert engine.tokens(ticket) == []
        for ticket, truth in zip(tickets, harness.truths, strict=True):
            assert engine.tokens(ticket) == truth.tokens
            assert engine.events[ticket, 0][-1].finish == FinishReason.LENGTH


def test_an_ill_request_cancelled_before_its_logits_harms_nobody(harness: RunnerHarness) -> None:
    """Its NaN was never seen in logits, only written to blocks."""
    engine = harness.engine(max_batch_tokens=24, max_running=8, kv_blocks=24)
    for _ in range(3):
        ill = engine.submit("ill", prompts(15)[14], 4)
        engine.step()
        engine.step()
        engine.scheduler.abort(ill, 0.0)
        engine.run()
        assert_equal_to_peft(engine, harness.truths)


def test_an_ill_merged_adapter_fails_alone_too(harness: RunnerHarness) -> None:
    engine = harness.engine()
    engine.merged_weights.reconcile(frozenset({engine.digests["ill"]}))
    engine.settle_merges()
    ticket = engine.submit("ill", prompts(1)[0], 4)
    engine.run()
    failure = engine.events[ticket, 0][-1].failure
    assert failure is not None
    assert failure.code == "NUMERIC"
    assert_equal_to_peft(engine, harness.truths)


class Broken(nn.Module):
    """Fails while a group holds a product that its siblings have not read."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize("error", [ValueError("a bug"), torch.OutOfMemoryError("no"), MemoryError()], ids=repr)
def test_a_failed_forward_leaves_nothing_behind(harness: RunnerHarness, error: Exception) -> None:
    engine = harness.engine()
    attention = engine.adapted.model.get_submodule("model.layers.1.self_attn")
    sound = attention.k_proj
    attention.k_proj = Broken(error)  # q_proj has computed all three
    tickets = submit(engine, harness.truths)
    engine.run()
    code = "INTERNAL" if isinstance(error, ValueError) else "OUT_OF_MEMORY"
    failures = [engine.events[ticket, 0][-1].failure for ticket in tickets]
    assert [failure.code for failure in failures if failure] == [code] * len(ORDER)
    assert all(group._kept is None for group in engine.adapted.groups)
    assert engine.adapted.cell.batch is None
    attention.k_proj = sound
    assert_equal_to_peft(engine, harness.truths)


def failing_above(limit: int, error: Callable[[], BaseException], original: Any) -> Any:
    def forward(self: ModelRunner, batch: ForwardBatch, adapters: Any) -> torch.Tensor:
        if len(batch.chunks) > limit:
            raise error()
        return original(self, batch, adapters)

    return forward


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError,
        lambda: RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        lambda: torch.AcceleratorError(
            "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
        ),
    ],
    ids=["torch", "python", "cpu allocator", "beside the allocator"],
)
def test_out_of_memory_is_retried_in_halves(
    harness: RunnerHarness, error: Callable[[], BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = harness.engine()
    monkeypatch.setattr(ModelRunner, "_forward", failing_above(2, error, ModelRunner._forward))
    penalized = SamplingParams(temperature=0.0, repetition_penalty=1.3, prompt_logprobs=0)
    tickets = submit(engine, harness.truths)
    mine = engine.submit("a", prompts(4)[3], 6, sampling=penalized)
    engine.run()
    for ticket, truth in zip(tickets, harness.truths, strict=True):
        assert engine.tokens(ticket) == truth.tokens
    monkeypatch.undo()
    calm = harness.engine()
    again = calm.submit("a", prompts(4)[3], 6, sampling=penalized)
    calm.run()
    assert calm.tokens(again) == engine.tokens(mine)


def test_an_id_the_model_has_no_row_for_ends_its_own_request_only(harness: RunnerHarness) -> None:
    """A tokenizer may have more tokens than the model, as when a padding token was added without resizing."""
    engine = harness.engine()
    tickets = submit(engine, harness.truths)
    penalized = SamplingParams(temperature=0.0, repetition_penalty=1.3, prompt_logprobs=0)
    mine = engine.submit("a", prompts(4)[3], 6, sampling=penalized)
    bad = engine.submit("b", [3, engine.adapted.spec.vocab_size, 5], 4)
    engine.run()
    failure = engine.events[bad, 0][-1].failure
    assert failure is not None
    assert failure.code == "INTERNAL"
    for ticket, truth in zip(tickets, harness.truths, strict=True):
        assert engine.tokens(ticket) == truth.tokens
    calm = harness.engine()
    again = calm.submit("a", prompts(4)[3], 6, sampling=penalized)
    calm.run()
    assert calm.tokens(again) == engine.tokens(mine)
    assert len(engine.events[mine, 0]) == len(calm.events[again, 0])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyError("a bug")], ids=repr)
def test_a_fault_while_tokens_are_drawn_is_contained_like_one_in_the_forward(
    harness: RunnerHarness, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = harness.engine()
    original = Sampler.sample

    def sample(self: Sampler, chunks: Any, *more: Any) -> Any:
        if len(chunks) > 2:
            raise error
        return original(self, chunks, *more)

    monkeypatch.setattr(Sampler, "sample", sample)
    tickets = submit(engine, harness.truths)
    engine.run()
    for ticket, truth in zip(tickets, harness.truths, strict=True):
        assert engine.tokens(ticket) == truth.tokens


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: an illegal memory access was encountered at line 77 in file ops.cu"),
        RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA"),
    ],
    ids=["torch", "library", "assert"],
)
def test_a_lost_device_is_no_failure_of_requests(
    harness: RunnerHarness, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = harness.engine()
    monkeypatch.setattr(ModelRunner, "_forward", failing_above(0, lambda: error, ModelRunner._forward))
    submit(engine, harness.truths)
    with pytest.raises(DeviceLost):
        engine.run()


def test_a_request_that_fits_never_is_told_so(harness: RunnerHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = harness.engine()
    monkeypatch.setattr(ModelRunner, "_forward", failing_above(0, MemoryError, ModelRunner._forward))
    ticket = engine.submit("a", prompts(1)[0], 2)
    engine.run()
    failure = engine.events[ticket, 0][-1].failure
    assert failure is not None
    assert failure.code == "OUT_OF_MEMORY"
    monkeypatch.undo()
    assert_equal_to_peft(engine, harness.truths)


def test_nothing_is_remembered_of_requests_that_ended(harness: RunnerHarness) -> None:
    engine = harness.engine()
    busy = SamplingParams(temperature=0.7, seed=3, repetition_penalty=1.2, logit_bias={5: 2.0}, prompt_logprobs=1)
    for truth in harness.truths:
        engine.submit(truth.adapter, truth.prompt, 4, sampling=busy)
    engine.run()
    engine.submit(None, [1], 1)  # retired ids travel with the next plan
    engine.run()
    engine.submit(None, [1], 1)
    engine.run()
    assert engine.runner._sampler.remembered() == 0
