"""Deterministic mode: a request's logits are the same bits alone and in company, preempted, or over cached blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.checkpoints import make_adapter_for, save_checkpoint, wide_model
from support.company import COMPANIES, check_exact
from support.processes import run_in_threads


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
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


@pytest.mark.parametrize("company", COMPANIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_alone_and_in_company(world: tuple[Path, dict[str, Path]], dtype: torch.dtype, company: str) -> None:
    seen = check_exact(*world, dtype, company)
    if company == "preempted":
        assert seen["preemptions"] > 0
    else:
        assert seen["cached"] > 0


@pytest.mark.parametrize("world", ["llama"], indirect=True)
def test_with_two_threads(world: tuple[Path, dict[str, Path]]) -> None:
    checkpoint, adapters = world
    adapters = {name: adapters[name] for name in ("b", "c")}
    arguments = [str(checkpoint), *(f"{name}={path}" for name, path in adapters.items())]
    run_in_threads(2, "from support.company import main; main()", *arguments)
