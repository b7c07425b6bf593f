"""The outline of a base is what its load finds, without its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from loramux_adapters.base.load import BaseRefused, load_base
from loramux_adapters.base.outline import read_outline
from loramux_adapters.embedded.tiny import tiny_path
from support.checkpoints import save_checkpoint, wide_model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2_moe"])
def test_it_says_what_a_loaded_base_says(architecture: str, tmp_path: Path) -> None:
    directory = save_checkpoint(wide_model(architecture), tmp_path / "base")
    spec, outline = load_base(directory, compute_dtype=torch.float32).spec, read_outline(directory)
    assert outline.modules == spec.modules
    for name in ("model_id", "vocab_size", "context_length", "head"):
        assert getattr(outline, name) == getattr(spec, name)


def test_end_tokens_come_from_the_generation_config_or_else_from_the_config(tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_path(), tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert read_outline(base).generation.eos_token_id == [5, 6]
    (base / "generation_config.json").unlink()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    assert read_outline(base).generation.eos_token_id == 7


def test_foreign_quantization_is_refused_as_a_load_refuses_it(tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_path(), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(BaseRefused, match="quantized by gptq"):
        read_outline(base)
