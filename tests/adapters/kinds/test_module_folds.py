"""What every method makes of one module's weight and bias, where they are merged: PEFT's own layer is right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from loramux_adapters.parts.registry import KIND_OF, KINDS
from loramux_adapters.spec import BaseModelSpec
from support.adapters import files_of, peft_warnings_ignored
from support.checkpoints import float_base, save_checkpoint, wide_model
from support.kinds import KindOracle, dequantized_model
from support.module_kinds import KINDS as METHODS
from support.module_kinds import butterflies, make_module_kind

MODULES = ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, BaseModelSpec]]:
    checkpoint = save_checkpoint(wide_model("qwen2"), tmp_path_factory.mktemp("base"))
    with butterflies():
        yield checkpoint, float_base(checkpoint).spec


@pytest.mark.parametrize("method", METHODS)
@torch.inference_mode()
def test_a_folded_module_is_pefts(method: str, base: tuple[Path, BaseModelSpec], tmp_path: Path) -> None:
    checkpoint, spec = base
    adapter = make_module_kind(checkpoint, tmp_path, method, "qwen2")
    weights = read(files_of(adapter), spec, ReadLimits())
    model, truth = dequantized_model(checkpoint), KindOracle(checkpoint, adapter).model
    for name in MODULES:
        module = model.get_submodule(name)
        weight, own = module.weight.clone(), module.bias
        bias = torch.zeros(len(weight)) if own is None else own.clone()
        parts = {KIND_OF[type(part)]: part for part in weights.modules[name].parts}
        assert parts
        for kind in KINDS:
            if kind in parts:
                kind.fold(weight, bias, parts[kind])
        x = torch.randn(16, module.in_features, generator=torch.Generator().manual_seed(0))
        with peft_warnings_ignored():
            expected = truth.get_submodule(f"base_model.model.{name}")(x)
        error = (torch.nn.functional.linear(x, weight, bias) - expected).abs().max() / expected.std()
        assert float(error) < 1e-5, name
        changed = (torch.nn.functional.linear(x, module.weight, own) - expected).abs().max() / expected.std()
        assert float(changed) > 1e-3, name
