"""Bottleneck adapters of AdapterHub's beside LoRA and base rows: each is what its reference says alone."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from loramux_adapters.apply.group import AdaptedSublayer
from loramux_adapters.parts.bottleneck import Bottleneck, Bottlenecks
from loramux_adapters.spec import BaseModelSpec
from loramux_adapters.weights import AdapterWeights
from support.against_peft import BOUND, Truth, assert_equal_to_peft, engine_for, prompts
from support.bottlenecks import make_bottleneck, variants
from support.checkpoints import float_base, save_checkpoint, wide_model
from support.combined import CombinedOracle, add_combination
from support.kinds import ask_oracle, assert_each_changes_what_is_said, dequantized_model, make_kind, targets_of
from support.model_engine import ModelEngine

ROOT = Path(__file__).resolve().parents[3]
ARCHITECTURES = ("llama", "qwen2", "gpt2")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    architecture: str = request.param
    root = tmp_path_factory.mktemp("case")
    checkpoint = save_checkpoint(wide_model(architecture), root / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, fan_in_fan_out=architecture == "gpt2", **targets_of(architecture))
    adapters = {"lora": make_kind(checkpoint, root / "lora", lora, seed=0)}
    for seed, (name, options) in enumerate(variants(architecture).items()):
        adapters[name] = make_bottleneck(dequantized_model(checkpoint), root / name, options, seed=seed)
    return checkpoint, adapters


@pytest.fixture(scope="module")
def truths(case: tuple[Path, dict[str, Path]]) -> list[Truth]:
    checkpoint, adapters = case
    names = [None, *adapters]
    return ask_oracle(checkpoint, adapters, list(zip(names, prompts(len(names), step=2), strict=True)))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deterministic": {"deterministic": True, "prefill_chunk": 16},
    "chunked": {"max_batch_tokens": 24, "max_running": 24},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_mixed_batch_equals_the_reference_alone(
    case: tuple[Path, dict[str, Path]], truths: list[Truth], options: str
) -> None:
    checkpoint, adapters = case
    assert_equal_to_peft(engine_for(checkpoint, adapters, **OPTIONS[options]), truths)


def test_each_of_them_changes_what_is_said(case: tuple[Path, dict[str, Path]], truths: list[Truth]) -> None:
    assert_each_changes_what_is_said(case[0], truths)


def test_a_deterministic_row_is_the_same_bits_alone(case: tuple[Path, dict[str, Path]]) -> None:
    """Units are padded: 13 of them, with a tanh, would be computed by a loop's tail in some rows and not in others."""
    checkpoint, adapters = case
    names = ["attention only", "par_bn of attention", "layer by layer", "lora"]
    engine = engine_for(checkpoint, {name: adapters[name] for name in names}, deterministic=True, prefix_cache=False)
    rows = list(zip(names, prompts(len(names)), strict=True))
    together = [engine.submit(name, prompt, 4) for name, prompt in rows]
    engine.run()
    for ticket, (name, prompt) in zip(together, rows, strict=True):
        alone = engine.submit(name, prompt, 4)
        engine.run()
        assert torch.equal(engine.logits(alone), engine.logits(ticket)), name


def test_an_adapter_leaves_nothing_when_it_goes(case: tuple[Path, dict[str, Path]]) -> None:
    checkpoint, adapters = case
    names = ["double_seq_bn", "lora", None, "par_bn", "double_seq_bn"]
    truths = ask_oracle(checkpoint, adapters, list(zip(names, prompts(len(names)), strict=True)), count=3)
    engine = engine_for(checkpoint, {name: adapters[name] for name in ("double_seq_bn", "lora", "par_bn")})
    for truth in truths:  # one after another: each leaves before the next comes
        assert_equal_to_peft(engine, [truth])
        for digest in engine.digests.values():
            engine.pool.discard(digest)
        engine.step()
        assert engine.pool.stats().resident == 0
        for sublayer in engine.adapted.sublayers:
            parts = sublayer.parts.of(Bottleneck)
            assert isinstance(parts, Bottlenecks)
            assert not parts.bound
            assert sublayer.entered is None


def test_a_step_without_bottlenecks_keeps_no_residual(
    case: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, adapters = case
    engine = engine_for(checkpoint, {name: adapters[name] for name in ("lora", "par_bn")})
    kept: list[AdaptedSublayer] = []
    leave = AdaptedSublayer.leave

    def spy(sublayer: AdaptedSublayer, y: torch.Tensor) -> None:
        kept.append(sublayer)
        leave(sublayer, y)

    monkeypatch.setattr(AdaptedSublayer, "leave", spy)
    for names, expected in (((None, "lora"), False), ((None, "lora", "par_bn"), True)):
        kept.clear()
        for name, prompt in zip(names, prompts(len(names)), strict=True):
            engine.submit(name, prompt, 1)
        engine.run()
        assert bool(kept) == expected


def test_what_a_failed_step_kept_is_dropped(case: tuple[Path, dict[str, Path]]) -> None:
    checkpoint, adapters = case
    rows: list[tuple[str | None, list[int]]] = [("par_bn", prompts(2)[1]), (None, prompts(3)[2])]
    truths = ask_oracle(checkpoint, adapters, rows, count=3)
    engine = engine_for(checkpoint, {"par_bn": adapters["par_bn"]})
    ticket = engine.submit("par_bn", prompts(1)[0], 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.adapted.groups[-2], "_forward", fail)
        engine.run()
    assert engine.events[ticket, 0][-1].failure is not None
    assert all(sublayer.entered is None for sublayer in engine.adapted.sublayers)
    assert_equal_to_peft(engine, truths)


def fail(_x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("as a device may")


def test_it_is_not_merged_and_acts_beside_what_is(case: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    checkpoint, adapters = case

    class Both(ModelEngine):
        """An adapter of two others' parts, which are on different sites."""

        def read(self, path: Path, base: BaseModelSpec) -> AdapterWeights:
            if path != tmp_path:
                return super().read(path, base)
            lora, hub = (super(Both, self).read(adapters[name], base) for name in ("lora", "double_seq_bn"))
            return AdapterWeights(replace(lora.spec, digest="d" * 64), {**lora.modules, **hub.modules})

    engine = Both(float_base(checkpoint), {"both": tmp_path, "alone": adapters["double_seq_bn"], **adapters})
    rows = list(zip(("both", "alone", "lora"), prompts(3), strict=True))
    gathered = [engine.submit(name, prompt, 4) for name, prompt in rows]
    engine.run()
    digests = {name: engine.digests[name] for name, _ in rows}
    engine.merged_weights.reconcile(frozenset(digests.values()))
    engine.settle_merges()
    states = {name: engine.merged_weights.state(digest) for name, digest in digests.items()}
    assert [states[name].state for name, _ in rows] == ["ready", "refused", "ready"]
    assert "a bottleneck is nonlinear, so it is in no weight; serve it as it is" in states["alone"].reason
    for ticket, (name, prompt) in zip(gathered, rows, strict=True):
        before = len(engine.plans)
        again = engine.submit(name, prompt, 4)
        engine.run()
        assert {plan.merged for plan in engine.plans[before:]} == {None if name == "alone" else digests[name]}
        assert engine.tokens(again) == engine.tokens(ticket)
        error = (engine.logits(again) - engine.logits(ticket)).abs().max() / engine.logits(ticket).std()
        assert float(error) < BOUND


PACKAGE = os.environ.get("ADAPTERHUB_PYTHON")
"""The Python of an environment with AdapterHub's package, see `support/adapterhub_package.py`."""


@pytest.mark.skipif(PACKAGE is None, reason="ADAPTERHUB_PYTHON names no Python that has AdapterHub's package")
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mistral", "qwen3", "gemma2", "gemma3_text"])
def test_it_is_what_adapterhubs_package_says(architecture: str, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(wide_model(architecture), tmp_path / "base")
    save_checkpoint(dequantized_model(checkpoint), tmp_path / "float")
    wanted = variants(architecture)
    rows = dict(zip(wanted, prompts(len(wanted), step=2), strict=True))
    job = {
        "checkpoint": str(tmp_path / "float"),
        "out": str(tmp_path),
        "count": 4,
        "rows": {name: {"options": wanted[name], "prompt": prompt} for name, prompt in rows.items()},
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    subprocess.run(
        [str(PACKAGE), "-P", str(ROOT / "tests/support/adapterhub_package.py"), str(tmp_path / "job.json")], check=True
    )
    said, logits = json.loads((tmp_path / "tokens.json").read_text()), load_file(tmp_path / "logits.safetensors")
    truths = [Truth(name, prompt, said[name], logits[name]) for name, prompt in rows.items()]
    adapters = {name: tmp_path / name for name in rows}
    assert_equal_to_peft(engine_for(checkpoint, adapters), truths)
    reference = ask_oracle(checkpoint, adapters, list(rows.items()))
    assert [truth.tokens for truth in reference] == [truth.tokens for truth in truths]


def test_combined_with_a_low_rank_it_acts_on_what_that_gives(case: tuple[Path, dict[str, Path]]) -> None:
    checkpoint, adapters = case
    engine, prompt = engine_for(checkpoint, adapters), prompts(1)[0]
    truths = []
    for name in list(adapters)[1:4]:
        terms = [("lora", 0.7), (name, 1.0)]
        add_combination(engine, f"lora and {name}", terms, float_base(checkpoint).spec)
        truths.append(CombinedOracle(checkpoint, adapters, terms).truth(f"lora and {name}", prompt, 4))
    assert_equal_to_peft(engine, [*truths, *ask_oracle(checkpoint, adapters, [(None, prompt), ("lora", prompt)])])
