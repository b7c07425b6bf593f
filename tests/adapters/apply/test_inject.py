"""Adapted modules in the model: siblings share one product, nothing stays behind, a bare model stays the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loramux_adapters.apply.inject import AdaptedModel, inject
from loramux_adapters.base.load import LoadedBase
from loramux_adapters.base.weight_formats import WeightFormats
from support.checkpoints import float_base, save_checkpoint, wide_model

IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(wide_model("llama"), tmp_path_factory.mktemp("inject") / "base")


def injected(base: LoadedBase, *, stack: bool = True, weight_formats: WeightFormats = WeightFormats()) -> AdaptedModel:
    return inject(base, capacity=16, stack=stack, weight_formats=weight_formats)


@pytest.mark.parametrize("stack", [True, False], ids=["stacked", "apart"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gemma", "phi3"])
def test_without_a_batch_the_model_is_the_bare_model_bit_for_bit(
    architecture: str, stack: bool, tmp_path: Path
) -> None:
    path = save_checkpoint(wide_model(architecture), tmp_path / "base")
    with torch.inference_mode():
        expected = float_base(path).model(IDS, use_cache=False).logits
        found = injected(float_base(path), stack=stack).model(IDS, use_cache=False).logits
    assert torch.equal(found, expected)


def test_siblings_are_one_group(checkpoint: Path) -> None:
    adapted = injected(float_base(checkpoint))
    keys = [tuple(name.rpartition(".")[2] for name in group.members) for group in adapted.groups]
    layer = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert sorted(keys) == sorted([*layer * 2, ("lm_head",)])
    assert [group.rows for group in adapted.groups if group.key == "lm_head"] == ["logits"]
    assert all(group.rows == "tokens" for group in adapted.groups if group.key != "lm_head")
    assert len(injected(float_base(checkpoint), stack=False).groups) == 15


def test_siblings_with_rows_that_share_blocks_stay_apart(tmp_path: Path) -> None:
    odd = {"hidden_size": 96, "head_dim": 24}
    path = save_checkpoint(wide_model("llama", **odd), tmp_path / "base")
    adapted = injected(float_base(path))
    assert {group.members for group in adapted.groups} == {(name,) for name in adapted.linears}
    assert adapted.refingerprint() == adapted.spec.fingerprint


def test_a_group_computes_once_and_keeps_nothing(checkpoint: Path) -> None:
    adapted = injected(float_base(checkpoint))
    group, _ = adapted.linears["model.layers.0.self_attn.q_proj"]
    calls = []
    forward = group.frozen.forward
    group.frozen.forward = lambda x: calls.append(1) or forward(x)  # type: ignore[method-assign, func-returns-value]
    with torch.inference_mode():
        adapted.model(IDS, use_cache=False)
    assert len(calls) == 1
    assert all(each._kept is None for each in adapted.groups)


def test_another_input_is_never_answered_with_a_kept_product(checkpoint: Path) -> None:
    adapted = injected(float_base(checkpoint))
    attention = adapted.model.get_submodule("model.layers.0.self_attn")
    x, other = torch.randn(1, 4, 128), torch.randn(1, 4, 128)
    with torch.inference_mode():
        separate = [attention.k_proj(other.clone()), attention.v_proj(x.clone())]
        adapted.reset()
        attention.q_proj(x)
        mixed = [attention.k_proj(other), attention.v_proj(x)]
    assert all(torch.equal(a, b) for a, b in zip(mixed, separate, strict=True))


def test_reset_drops_what_a_failed_forward_left(checkpoint: Path) -> None:
    adapted = injected(float_base(checkpoint))
    attention = adapted.model.get_submodule("model.layers.0.self_attn")
    with torch.inference_mode():
        attention.q_proj(torch.randn(1, 4, 128))
    assert any(group._kept is not None for group in adapted.groups)
    adapted.reset()
    assert all(group._kept is None for group in adapted.groups)


def test_layouts_do_not_change_the_identity(checkpoint: Path) -> None:
    for weight_formats in (WeightFormats(dense=True), WeightFormats(invariant=True), WeightFormats()):
        adapted = injected(float_base(checkpoint), weight_formats=weight_formats)
        assert adapted.refingerprint() == adapted.spec.fingerprint
