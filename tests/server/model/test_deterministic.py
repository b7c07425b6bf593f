"""Deterministic mode: logits are the same bits alone, beside batch mates, preempted, or over cached blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.batch_mates import BATCHES, check_exact
from support.checkpoints import make_adapter_for, save_checkpoint, wide_model
from support.processes import run_in_threads


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def checkpoint_and_adapters(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("exact")
    more = {"sliding_window": 20} if request.param == "gemma2" else {}
    checkpoint = save_checkpoint(wide_model(request.param, **more), root / "base")
    return checkpoint, {
        "a": make_adapter_for(
            checkpoint, root / "a", seed=1, r=3, target_modules=["q_proj", "up_proj", "embed_tokens"]
        ),
        "b": make_adapter_for(checkpoint, root / "b", seed=2, r=24, target_modules="all-linear"),
        "c": make_adapter_for(checkpoint, root / "c", seed=3, r=8, target_modules=["lm_head", "k_proj", "v_proj"]),
    }


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_alone_and_among_batch_mates(
    checkpoint_and_adapters: tuple[Path, dict[str, Path]], dtype: torch.dtype, batch: str
) -> None:
    seen = check_exact(*checkpoint_and_adapters, dtype, batch)
    if batch == "preempted":
        assert seen["preemptions"] > 0
    else:
        assert seen["cached"] > 0


@pytest.mark.parametrize("checkpoint_and_adapters", ["llama"], indirect=True)
def test_with_two_threads(checkpoint_and_adapters: tuple[Path, dict[str, Path]]) -> None:
    checkpoint, adapters = checkpoint_and_adapters
    adapters = {name: adapters[name] for name in ("b", "c")}
    arguments = [str(checkpoint), *(f"{name}={path}" for name, path in adapters.items())]
    run_in_threads(2, "from support.batch_mates import main; main()", *arguments)
