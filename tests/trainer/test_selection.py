"""Configs that select exactly some modules, each with its rank and alpha: PEFT and our reader find the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.lora import EMBEDDING_SUFFIXES, LINEAR_SUFFIXES
from loramux_adapters.formats.peft.tensors import PREFIX
from loramux_adapters.formats.peft.writer import write_files
from loramux_adapters.formats.registry import read
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.spec import BaseModelSpec
from loramux_trainer.methods.selection import ranks, select
from loramux_trainer.targets import ModuleShape
from support.adapters import files_of, load_in_peft, peft_deltas, spec_of, tiny_model

FIRST, SECOND = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"


def lora_config(base: BaseModelSpec, shapes: dict[str, ModuleShape], **options: Any) -> dict[str, Any]:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.model_id,
        "inference_mode": True,
        "fan_in_fan_out": all(base.modules[name].kind == "conv1d" for name in shapes),
        **options,
    }
    return select({**config, **ranks(shapes, alpha="lora_alpha")}, tuple(shapes), base)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("architecture", "wanted"),
    [
        ("llama", {"model.layers.0.self_attn.q_proj": (4, 8), "model.layers.1.self_attn.q_proj": (4, 8)}),
        ("llama", {"model.layers.0.self_attn.q_proj": (4, 8), "model.layers.1.mlp.up_proj": (2, 8)}),
        ("llama", {FIRST: (3, 8), SECOND: (5, 8), "lm_head": (2, 8)}),
        ("llama", {FIRST: (4, 1), SECOND: (4, 6)}),
        ("llama", {"model.embed_tokens": (3, 8), "model.layers.0.self_attn.v_proj": (3, 8)}),
        ("gpt2", {"transformer.h.0.attn.c_attn": (4, 8), "transformer.h.1.mlp.c_proj": (1, 8)}),
    ],
)
def test_peft_and_we_read_the_same(
    architecture: str, wanted: dict[str, tuple[int, float]], use_rslora: bool, tmp_path: Path
) -> None:
    model = tiny_model(architecture, tie_word_embeddings=False)
    base = spec_of(model)
    scales = {name: alpha / rank ** (0.5 if use_rslora else 1) for name, (rank, alpha) in wanted.items()}
    shapes = {name: ModuleShape(*each, scales[name]) for name, each in wanted.items()}
    tensors, deltas = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, (rank, _) in wanted.items():
        module = base.modules[name]
        suffixes = EMBEDDING_SUFFIXES if module.kind == "embedding" else LINEAR_SUFFIXES
        a = torch.randn(rank, module.in_features, generator=generator)
        b = torch.randn(module.out_features, rank, generator=generator)
        tensors |= {f"{PREFIX}{name}{suffixes['a']}": a, f"{PREFIX}{name}{suffixes['b']}": b}
        deltas[name] = scales[name] * b @ a
    write_files(tmp_path, lora_config(base, shapes, use_rslora=use_rslora), tensors, base.fingerprint)
    weights = read(files_of(tmp_path), base, ReadLimits())
    in_peft = peft_deltas(load_in_peft(model, tmp_path))
    assert weights.spec.ranks == {name: rank for name, (rank, _) in wanted.items()}
    assert in_peft.keys() == wanted.keys()
    for name, delta in deltas.items():
        low_rank = weights.modules[name].get(LowRank)
        assert low_rank is not None
        torch.testing.assert_close(low_rank.b @ low_rank.a, delta)
        torch.testing.assert_close(in_peft[name], delta)


def test_suffixes_are_written_where_they_say_it_all() -> None:
    base = spec_of(tiny_model("llama"))
    every_q = [name for name in base.modules if name.endswith("q_proj")]
    shape = ModuleShape(2, 4, 2.0)
    assert lora_config(base, dict.fromkeys(every_q, shape))["target_modules"] == ["q_proj"]
    assert lora_config(base, {every_q[0]: shape})["target_modules"] == [every_q[0]]


def test_modules_that_no_config_selects_are_refused() -> None:
    base = spec_of(tiny_model("llama"))
    with pytest.raises(ValueError, match="cannot be told apart"):
        select({"peft_type": "LORA", "r": 2, "lora_alpha": 4}, ("model.layers.9.mlp.up_proj",), base)
