"""Methods that put something before the prompt, or act in a part of it: PEFT on the dequantized base is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import PeftConfig

from loramux_server.requests import SamplingParams
from support.against_peft import Truth, assert_equal_to_peft, engine_for, prompts
from support.checkpoints import save_checkpoint, wide_model
from support.kinds import ask_oracle, assert_each_changes_what_is_said, make_kind, targets_of

ARCHITECTURES = ("llama", "qwen2", "gpt2")
INVOCATION = [7, 11]


def prompted(config: Callable[..., PeftConfig], count: int, **options: Any) -> Callable[[str], PeftConfig]:
    return lambda architecture: config(task_type="CAUSAL_LM", num_virtual_tokens=count, **options)


def alora(architecture: str) -> PeftConfig:
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, alora_invocation_tokens=INVOCATION, fan_in_fan_out=architecture == "gpt2",
        **targets_of(architecture),
    )  # fmt: skip


KINDS: dict[str, Callable[[str], PeftConfig]] = {
    "prompt": prompted(peft.PromptTuningConfig, 20),
    "prompt-short": prompted(peft.PromptTuningConfig, 3),
    "p-tuning": prompted(peft.PromptEncoderConfig, 16, encoder_hidden_size=24),
    "prefix": prompted(peft.PrefixTuningConfig, 21),
    "prefix-projected": prompted(peft.PrefixTuningConfig, 5, prefix_projection=True, encoder_hidden_size=24),
    "cartridge": prompted(peft.CartridgeConfig, 33),
    "alora": alora,
    "lora": lambda architecture: peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, fan_in_fan_out=architecture == "gpt2", **targets_of(architecture)
    ),
}


def prompt_of(name: str | None, prompt: list[int]) -> list[int]:
    """Activated ones are invoked within the prompt, the last of two invocations counts."""
    middle = len(prompt) // 2
    return [*prompt[:2], *INVOCATION, *prompt[2:middle], *INVOCATION, *prompt[middle:]] if name == "alora" else prompt


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    architecture: str = request.param
    root = tmp_path_factory.mktemp("case")
    checkpoint = save_checkpoint(wide_model(architecture), root / "base")
    return checkpoint, {
        name: make_kind(checkpoint, root / name, config(architecture), seed=seed, std=0.3)
        for seed, (name, config) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="module")
def truths(case: tuple[Path, dict[str, Path]]) -> list[Truth]:
    checkpoint, adapters = case
    names = [None, *adapters]
    return ask_oracle(
        checkpoint,
        adapters,
        [(name, prompt_of(name, prompt)) for name, prompt in zip(names, prompts(len(names), step=2), strict=True)],
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deterministic": {"deterministic": True, "prefill_chunk": 16},
    "chunked": {"max_batch_tokens": 24, "max_running": 24},
    "uncached": {"prefix_cache": False},
    "preempted": {"block_tokens": 1, "kv_blocks": 230},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_mixed_batch_equals_peft_alone(case: tuple[Path, dict[str, Path]], truths: list[Truth], options: str) -> None:
    """The second half of the rows finds what the first left in the prefix cache."""
    checkpoint, adapters = case
    engine = engine_for(checkpoint, adapters, **OPTIONS[options])
    assert_equal_to_peft(engine, truths)
    assert_equal_to_peft(engine, truths)
    if options == "preempted":
        assert engine.scheduler.take_counters().preemptions


def test_each_of_them_changes_what_is_said(case: tuple[Path, dict[str, Path]], truths: list[Truth]) -> None:
    assert_each_changes_what_is_said(case[0], truths)


def test_virtual_tokens_are_not_in_usage_penalties_and_log_probabilities(case: tuple[Path, dict[str, Path]]) -> None:
    checkpoint, adapters = case
    engine = engine_for(checkpoint, adapters)
    prompt = prompts(1)[0]
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=1, repetition_penalty=1.3)
    tickets = [engine.submit(name, prompt, 3, sampling=sampling) for name in (None, "prompt", "prefix")]
    engine.run()
    for ticket in tickets:
        events = engine.events[ticket, 0]
        told = next(event.prompt_logprobs for event in events if event.prompt_logprobs is not None)
        assert told[0] is None
        assert [each.token for each in told[1:] if each is not None] == prompt[1:]
        usage = events[-1].usage
        assert usage is not None
        assert (usage.prompt, usage.cached) == (len(prompt), 0)
