"""Adapters that are well formed and mean harm: each harms its own requests alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftConfig

from loramux_adapters.base.load import load_base
from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from support.adapters import edit_config, edit_tensors
from support.against_peft import Truth, assert_equal_to_peft, prompts
from support.checkpoints import float_base, save_checkpoint, wide_model
from support.kinds import ask_oracle, make_kind
from support.model_engine import ModelEngine

Tensors = dict[str, torch.Tensor]
ATTENTION = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


def filled(value: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: torch.full_like(tensor, value) for name, tensor in tensors.items()}


def filled_but_for_copies(tensors: Tensors) -> Tensors:
    """A copy of the base that differs from it would be refused."""
    return {
        name: tensor if "original_module" in name else torch.full_like(tensor, 1e38) for name, tensor in tensors.items()
    }


HOSTILE: dict[str, tuple[PeftConfig, Callable[[Tensors], Tensors]]] = {
    "lora of 1e30": (peft.LoraConfig(r=4, **ATTENTION), filled(1e30)),
    "dora of 1e30": (peft.LoraConfig(r=4, use_dora=True, **ATTENTION), filled(1e30)),
    "gains of 0": (peft.IA3Config(feedforward_modules=[], **ATTENTION), filled(0.0)),
    "gains of 1e38": (peft.IA3Config(feedforward_modules=[], **ATTENTION), filled(1e38)),
    "virtual tokens of 1e38": (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), filled(1e38)),
    "a prefix of 1e38": (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), filled(1e38)),
    "norms of 1e38": (peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]), filled(1e38)),
    "added tokens of 1e38": (
        peft.LoraConfig(r=4, modules_to_save=["embed_tokens", "lm_head"], **ATTENTION),
        filled_but_for_copies,
    ),
    "tokens of 1e38": (peft.LoraConfig(r=4, trainable_token_indices=list(range(320)), **ATTENTION), filled(1e38)),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path], list[Truth]]:
    root = tmp_path_factory.mktemp("case")
    checkpoint = save_checkpoint(wide_model("llama"), root / "base")
    good = make_kind(checkpoint, root / "good", peft.LoraConfig(r=4, **ATTENTION), seed=0)
    adapters = {"good": good}
    for seed, (name, (config, change)) in enumerate(HOSTILE.items(), 1):
        vocabulary = 400 if name.startswith("added") else None
        adapters[name] = make_kind(checkpoint, root / name, config, seed=seed, vocabulary=vocabulary)
        edit_tensors(adapters[name], change)
    rows = [(name, prompt) for name, prompt in zip((None, "good", None, "good"), prompts(4), strict=True)]
    return checkpoint, adapters, ask_oracle(checkpoint, {"good": good}, rows)


@pytest.mark.parametrize("name", HOSTILE)
def test_neighbors_are_answered_as_if_it_were_not_there(
    case: tuple[Path, dict[str, Path], list[Truth]], name: str
) -> None:
    checkpoint, adapters, truths = case
    engine = ModelEngine(float_base(checkpoint), {key: adapters[key] for key in ("good", name)})
    hostile = [engine.submit(name, prompt, 4) for prompt in prompts(3)]
    assert_equal_to_peft(engine, truths)
    assert_equal_to_peft(engine, truths)  # what it left in cache and slots
    for ticket in hostile:
        last = engine.events[ticket, 0][-1]
        assert last.terminal
        assert last.failure is None or last.failure.code in ("NUMERIC", "ADAPTER_INCOMPATIBLE", "ADAPTER_LOAD_FAILED")
    engine.scheduler.check()


def test_what_is_not_finite_in_the_compute_dtype_never_reaches_the_device(
    case: tuple[Path, dict[str, Path], list[Truth]],
) -> None:
    """3.4e38 is a float32 and no bfloat16."""
    checkpoint, adapters, _ = case
    name = "virtual tokens of 1e38"
    edit_tensors(adapters[name], filled(torch.finfo(torch.float32).max))
    engine = ModelEngine(load_base(checkpoint, compute_dtype=torch.bfloat16), {name: adapters[name]})
    ticket = engine.submit(name, prompts(1)[0], 2)
    engine.run()
    failure = engine.events[ticket, 0][-1].failure
    assert failure is not None
    assert "not finite in bfloat16" in failure.message
    assert engine.adapted.slot_kinds == {}


def test_an_invocation_of_a_whole_vocabulary_is_refused(
    case: tuple[Path, dict[str, Path], list[Truth]], tmp_path: Path
) -> None:
    checkpoint, _, _ = case
    adapter = make_kind(checkpoint, tmp_path / "a", peft.LoraConfig(r=4, **ATTENTION), seed=9)
    for ids, words in ((list(range(2000)), "more than 1024 ids"), ([400], "over the vocabulary of 320")):
        edit_config(adapter, alora_invocation_tokens=ids)
        with pytest.raises((AdapterInvalid, AdapterIncompatible), match=words):
            ModelEngine(float_base(checkpoint), {"a": adapter})
