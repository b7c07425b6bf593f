"""Directories we write are read by PEFT and by us alike, and are the same bytes each time."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.writer import TrainedModule, write_peft
from loramux_adapters.formats.registry import read
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.spec import BaseModelSpec
from support.adapters import CONFIG, WEIGHTS, files_of, load_in_peft, peft_deltas, spec_of, tiny_model


def trained(base: BaseModelSpec, ranks: dict[str, int], alpha: float = 8) -> dict[str, TrainedModule]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: TrainedModule(
            torch.randn(rank, base.modules[name].in_features, generator=generator),
            torch.randn(base.modules[name].out_features, rank, generator=generator),
            alpha,
        )
        for name, rank in ranks.items()
    }


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("architecture", "ranks"),
    [
        ("llama", {"model.layers.0.self_attn.q_proj": 4, "model.layers.1.self_attn.q_proj": 4}),
        ("llama", {"model.layers.0.self_attn.q_proj": 4, "model.layers.1.mlp.up_proj": 2}),
        ("llama", {"model.layers.0.mlp.up_proj": 3, "model.layers.1.mlp.up_proj": 5, "lm_head": 2}),
        ("llama", {"model.embed_tokens": 3, "model.layers.0.self_attn.v_proj": 3}),
        ("gpt2", {"transformer.h.0.attn.c_attn": 4, "transformer.h.1.mlp.c_proj": 1}),
    ],
)
def test_peft_and_we_read_the_same(architecture: str, ranks: dict[str, int], use_rslora: bool, tmp_path: Path) -> None:
    model = tiny_model(architecture, tie_word_embeddings=False)
    base = spec_of(model)
    modules = trained(base, ranks)
    write_peft(tmp_path, modules, base, use_rslora=use_rslora)
    weights = read(files_of(tmp_path), base, ReadLimits())
    deltas = peft_deltas(load_in_peft(model, tmp_path))
    assert weights.spec.ranks == ranks
    assert deltas.keys() == ranks.keys()
    for name, module in modules.items():
        low_rank = weights.modules[name].get(LowRank)
        assert low_rank is not None
        scale = 8 / module.rank ** (0.5 if use_rslora else 1)
        torch.testing.assert_close(low_rank.b @ low_rank.a, scale * module.b @ module.a)
        torch.testing.assert_close(deltas[name], scale * module.b @ module.a)


def test_it_declares_its_base_and_is_reproducible(tmp_path: Path) -> None:
    base = spec_of(tiny_model("llama"))
    modules = trained(base, {"model.layers.1.self_attn.q_proj": 4, "model.layers.0.self_attn.q_proj": 2}, alpha=3)
    write_peft(tmp_path / "one", modules, base)
    write_peft(tmp_path / "two", dict(reversed(modules.items())), base)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with safe_open(tmp_path / "one" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"loramux_base_fingerprint": base.fingerprint}
    spec = read(files_of(tmp_path / "one"), base, ReadLimits()).spec
    assert spec.base_fingerprint == base.fingerprint


def test_suffixes_are_written_where_they_say_it_all(tmp_path: Path) -> None:
    base = spec_of(tiny_model("llama"))
    every_q = [name for name in base.modules if name.endswith("q_proj")]
    write_peft(tmp_path / "all", trained(base, dict.fromkeys(every_q, 2)), base)
    write_peft(tmp_path / "some", trained(base, {every_q[0]: 2}), base)
    assert json.loads((tmp_path / "all" / CONFIG).read_text())["target_modules"] == ["q_proj"]
    assert json.loads((tmp_path / "some" / CONFIG).read_text())["target_modules"] == [every_q[0]]


def test_alphas_differ_per_module(tmp_path: Path) -> None:
    model = tiny_model("llama")
    base = spec_of(model)
    first, second = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    modules = trained(base, {first: 4}, alpha=1) | trained(base, {second: 4}, alpha=6)
    write_peft(tmp_path, modules, base)
    deltas = peft_deltas(load_in_peft(model, tmp_path))
    for name, scale in ((first, 0.25), (second, 1.5)):
        low_rank = read(files_of(tmp_path), base, ReadLimits()).modules[name].get(LowRank)
        assert low_rank is not None
        torch.testing.assert_close(low_rank.b @ low_rank.a, scale * modules[name].b @ modules[name].a)
        torch.testing.assert_close(deltas[name], scale * modules[name].b @ modules[name].a)


def test_what_does_not_fit_the_base_is_refused(tmp_path: Path) -> None:
    base = spec_of(tiny_model("llama"))
    fits = trained(base, {"model.layers.0.mlp.up_proj": 4})["model.layers.0.mlp.up_proj"]
    with pytest.raises(ValueError, match="at least one module"):
        write_peft(tmp_path, {}, base)
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        write_peft(tmp_path, {"nowhere": fits}, base)
    with pytest.raises(ValueError, match="should be"):
        write_peft(tmp_path, {"model.layers.0.mlp.down_proj": fits}, base)
    assert not list(tmp_path.iterdir())
