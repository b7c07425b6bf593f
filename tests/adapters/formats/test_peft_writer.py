"""Directories we write name their base, and are the same bytes each time."""

import os
from pathlib import Path

import torch
from safetensors import safe_open

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.writer import write_files
from loramux_adapters.formats.registry import read
from support.adapters import CONFIG, WEIGHTS, files_of, spec_of, tiny_model

PREFIX = "base_model.model."


def test_it_declares_its_base_and_is_reproducible(tmp_path: Path) -> None:
    base = spec_of(tiny_model("llama"))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    tensors = {}
    for name, module in base.modules.items():
        if name.endswith("q_proj"):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(2, module.in_features)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(module.out_features, 2)
    write_files(tmp_path / "one", config, tensors, base.fingerprint)
    write_files(tmp_path / "two", dict(reversed(config.items())), dict(reversed(tensors.items())), base.fingerprint)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with safe_open(tmp_path / "one" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"loramux_base_fingerprint": base.fingerprint}
    weights = read(files_of(tmp_path / "one"), base, ReadLimits())
    assert weights.spec.base_fingerprint == base.fingerprint
    assert len(weights.spec.ranks) == 2


def test_both_files_are_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_files(tmp_path, {"peft_type": "LORA"}, {"a": torch.ones(1)}, None)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in (CONFIG, WEIGHTS)] == [0o640, 0o640]
