"""Mutations are noticed: whatever is changed in a good adapter is refused by name, or no longer gives PEFT's logits."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from loramux_adapters.errors import AdapterError, AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.declared_base import FINGERPRINT_KEY
from support.adapters import edit_config, edit_tensors
from support.against_peft import BOUND, Truth, ask_peft, engine_for, prompts
from support.checkpoints import float_base, make_adapter_for, save_checkpoint, wide_model

TARGETS = ["q_proj", "v_proj", "down_proj"]
PREFIX = "base_model.model.model.layers"
Mutation = Callable[[Path], None]


def rename(old: str, new: str) -> Mutation:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        return renamed

    return lambda path: edit_tensors(path, change)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Mutation:
    return lambda path: edit_tensors(path, change)


def config(**changes: object) -> Mutation:
    return lambda path: edit_config(path, **changes)


def swap_factors(content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = f"{PREFIX}.0.self_attn.q_proj.lora_{{}}.weight"
    return content | {name.format("A"): content[name.format("B")].T, name.format("B"): content[name.format("A")].T}


def swap_layers(content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    other = {"layers.0": "layers.1", "layers.1": "layers.0"}
    return {re.sub(r"layers\.[01]", lambda found: other[found[0]], name): tensor for name, tensor in content.items()}


def without(part: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda content: {name: tensor for name, tensor in content.items() if part not in name}


def cut(content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor[:3] if "lora_A" in name else tensor[:, :3] for name, tensor in content.items()}


REFUSED: dict[str, tuple[Mutation, str]] = {
    "rank": (config(r=8), r"lora_A.*shape \[4, \d+\] should be \[8"),
    "rank pattern": (config(rank_pattern={"q_proj": 8}), r"q_proj.*lora_[AB].*8"),
    "tensor name": (rename("layers.0.self_attn.q_proj.lora_A", "layers.0.self_attn.q_prj.lora_A"), "q_prj|q_proj"),
    "tensor of no layer": (rename("layers.1.", "layers.7."), r"layers\.[17]"),
    "tensor gone": (tensors(without("layers.0.self_attn.q_proj.lora_B")), r"layers\.0\.self_attn\.q_proj"),
    "module gone": (tensors(without("layers.1.mlp.down_proj")), r"layers\.1\.mlp\.down_proj"),
    "target added": (config(target_modules=[*TARGETS, "k_proj"]), "k_proj"),
    "target gone": (config(target_modules=TARGETS[:2]), "down_proj"),
    "target unknown": (config(target_modules=["query_key_value"]), "target_modules selects no module of llama base"),
    "layer excluded": (config(layers_to_transform=[0]), r"layers\.1"),
    "module excluded": (config(exclude_modules=["v_proj"]), "v_proj"),
    "kind": (config(peft_type="POLY"), "Poly adapters are not served"),
    "dora": (config(use_dora=True), "lora_magnitude_vector is missing"),
    "dtype": (tensors(lambda content: {n: t.to(torch.int8) for n, t in content.items()}), "I8"),
    "cut to rank 3": (tensors(cut), "lora_[AB]"),
    "nan": (tensors(lambda c: {n: torch.full_like(t, float("nan")) for n, t in c.items()}), "finite"),
    "base": (
        lambda path: edit_tensors(path, lambda content: content, {FINGERPRINT_KEY: "0" * 64}),
        "trained on base 0000",
    ),
}
ANSWERS_DIFFER: dict[str, Mutation] = {
    "alpha": config(lora_alpha=9),
    "alpha pattern": config(alpha_pattern={"down_proj": 9}),
    "rslora": config(use_rslora=True),
    "one rank row": tensors(
        lambda content: {n: torch.cat([t[:1] * 2, t[1:]]) if "q_proj.lora_A" in n else t for n, t in content.items()}
    ),
    "layers swapped": tensors(swap_layers),
    "sign": tensors(lambda content: {n: -t if "down_proj.lora_B" in n else t for n, t in content.items()}),
}


@dataclass(frozen=True)
class MutationHarness:
    checkpoint: Path
    adapter: Path
    truth: Truth


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> MutationHarness:
    root = tmp_path_factory.mktemp("mutations")
    checkpoint = save_checkpoint(wide_model("llama"), root / "base")
    adapter = make_adapter_for(checkpoint, root / "a", seed=1, r=4, lora_alpha=8, target_modules=TARGETS)
    [truth] = ask_peft(checkpoint, {"a": adapter}, [("a", prompts(3)[2])], count=4)
    return MutationHarness(checkpoint, adapter, truth)


def mutated(harness: MutationHarness, tmp_path: Path, mutate: Mutation) -> Path:
    path = tmp_path / "mutated"
    shutil.copytree(harness.adapter, path)
    mutate(path)
    return path


def difference(harness: MutationHarness, adapter: Path) -> float:
    """Largest logit difference from PEFT with the unchanged adapter, over the logits' deviation."""
    engine = engine_for(harness.checkpoint, {"a": adapter})
    ticket = engine.submit("a", harness.truth.prompt, 1)
    engine.run()
    return float((engine.logits(ticket)[0] - harness.truth.logits[0]).abs().max() / harness.truth.logits.std())


def test_unchanged_it_is_accepted_and_equal(harness: MutationHarness, tmp_path: Path) -> None:
    assert difference(harness, mutated(harness, tmp_path, lambda path: None)) < BOUND


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_is_wrong(harness: MutationHarness, tmp_path: Path, name: str) -> None:
    mutate, reason = REFUSED[name]
    with pytest.raises((AdapterInvalid, AdapterIncompatible), match=reason) as refused:
        engine_for(harness.checkpoint, {"a": mutated(harness, tmp_path, mutate)})
    assert refused.value.subject


@pytest.mark.parametrize("name", ANSWERS_DIFFER)
def test_accepted_but_seen_in_the_logits(harness: MutationHarness, tmp_path: Path, name: str) -> None:
    assert difference(harness, mutated(harness, tmp_path, ANSWERS_DIFFER[name])) > 10 * BOUND


def test_factors_changed_for_one_another(harness: MutationHarness, tmp_path: Path) -> None:
    """q_proj is square here: shapes alone cannot tell A^T from B, ranks can."""
    path = mutated(harness, tmp_path, tensors(swap_factors))
    try:
        noticed = difference(harness, path) > 10 * BOUND
    except AdapterError as error:
        noticed = "q_proj" in str(error)
    assert noticed


def test_another_base(harness: MutationHarness, tmp_path: Path) -> None:
    """Declared, it is refused; undeclared, the logits show it."""
    other = save_checkpoint(wide_model("llama", seed=1), tmp_path / "other")
    declared = mutated(
        harness,
        tmp_path,
        lambda path: edit_tensors(
            path, lambda content: content, {FINGERPRINT_KEY: float_base(harness.checkpoint).spec.fingerprint}
        ),
    )
    assert difference(harness, declared) < BOUND
    with pytest.raises(AdapterIncompatible, match="was trained on base"):
        engine_for(other, {"a": declared})
    elsewhere = MutationHarness(other, harness.adapter, harness.truth)
    assert difference(elsewhere, harness.adapter) > 10 * BOUND
