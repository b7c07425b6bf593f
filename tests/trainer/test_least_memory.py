"""A run that cannot fit is refused before its base is loaded, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loramux_adapters.base.load import quantized_modules
from loramux_adapters.base.outline import read_outline
from loramux_adapters.embedded.tiny import tiny_path
from loramux_trainer import fleet_run, least_memory
from loramux_trainer.errors import JobInvalid
from loramux_trainer.job import parse_job
from loramux_trainer.least_memory import base_bytes, check_memory
from loramux_trainer.run import train
from support.tiny import load_tiny
from support.training import job_values

CPU = torch.device("cpu")


def test_a_base_takes_at_least_what_is_counted() -> None:
    outline, loaded = read_outline(tiny_path()), load_tiny()
    held = 0
    for _, module in quantized_modules(loaded.model):
        held += module.codes.nbytes + module.absmax.nbytes
    held += loaded.model.get_input_embeddings().weight.nbytes
    assert base_bytes(outline, torch.float32, nested=False) == held
    assert base_bytes(outline, torch.bfloat16, nested=True) < held


def test_what_is_trained_counts_twice_and_the_last_byte_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = parse_job({**job_values(tmp_path), "lora": {"rank": 8, "target_modules": ["q_proj"]}})
    outline = read_outline(tiny_path())
    held = base_bytes(outline, torch.float32, nested=False)
    sites = [module for name, module in outline.modules.items() if name.endswith("q_proj")]
    trained = 8 * 8 * sum(module.in_features + module.out_features for module in sites)
    monkeypatch.setattr(least_memory, "free_bytes", lambda device: held + 2 * trained)
    check_memory([job, job], outline, CPU, torch.float32)
    monkeypatch.setattr(least_memory, "free_bytes", lambda device: held + 2 * trained - 1)
    with pytest.raises(JobInvalid, match="and cpu has") as refused:
        check_memory([job, job], outline, CPU, torch.float32)
    assert refused.value.remedy.startswith("lower lora.rank or fleet.max_members; ")
    monkeypatch.setattr(least_memory, "free_bytes", lambda device: held - 1)
    with pytest.raises(JobInvalid, match="model: the base takes"):
        check_memory([job], outline, CPU, torch.float32)


def test_a_run_that_cannot_fit_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_memory, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(fleet_run, "load", lambda *_: pytest.fail("the base is loaded"))
    with pytest.raises(JobInvalid, match=r"the base takes .* and cpu has 0\.00 GB free"):
        train(parse_job(job_values(tmp_path)))
    assert not (tmp_path / "out").exists()
