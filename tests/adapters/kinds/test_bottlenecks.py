"""Bottleneck adapters of AdapterHub's beside LoRA and base rows: each is what its reference says alone."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

from support.against_peft import Truth, assert_equal_to_peft, engine_for, prompts
from support.bottlenecks import make_bottleneck, variants
from support.checkpoints import save_checkpoint, wide_model
from support.kinds import ask_oracle, dequantized_model, make_kind, targets_of

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


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deterministic": {"deterministic": True, "prefill_chunk": 16},
    "chunked": {"max_batch_tokens": 24, "max_running": 24},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_mixed_batch_equals_the_reference_alone(case: tuple[Path, dict[str, Path]], options: str) -> None:
    checkpoint, adapters = case
    names = [None, *adapters]
    truths = ask_oracle(checkpoint, adapters, list(zip(names, prompts(len(names), step=2), strict=True)))
    assert_equal_to_peft(engine_for(checkpoint, adapters, **OPTIONS[options]), truths)


def test_each_of_them_changes_what_is_said(case: tuple[Path, dict[str, Path]]) -> None:
    checkpoint, adapters = case
    prompt = prompts(3)[2]
    base, *adapted = ask_oracle(checkpoint, adapters, [(name, prompt) for name in (None, *adapters)], count=1)
    for truth in adapted:
        assert float((truth.logits - base.logits).abs().max() / base.logits.std()) > 0.01, truth.adapter


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
