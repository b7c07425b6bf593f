"""AdaLoRA after pruning, as PEFT's own training leaves and saves it."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from peft import get_peft_model

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from support.adapters import edit_config, files_of, peft_warnings_ignored, save
from support.against_peft import assert_equal_to_peft, engine_for, prompts
from support.checkpoints import float_base, save_checkpoint, wide_model
from support.kinds import ask_oracle, dequantized_model, targets_of


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("case")
    checkpoint = save_checkpoint(wide_model("llama"), root / "base")
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=6, target_r=2, lora_alpha=16, total_step=8, tinit=1, tfinal=2, deltaT=1,
        **targets_of("llama"),
    )  # fmt: skip
    with peft_warnings_ignored(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(dequantized_model(checkpoint)), config)
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05)
        ids = torch.randint(0, 320, (2, 12))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_E" in name:
                    parameter.normal_(std=0.5)
        for step in range(8):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        return checkpoint, save(model, root / "pruned")


def test_it_equals_peft(case: tuple[Path, Path]) -> None:
    checkpoint, pruned = case
    spec = read(files_of(pruned), float_base(checkpoint).spec, ReadLimits()).spec
    assert 0 < sum(spec.ranks.values()) < 6 * len(spec.ranks)
    adapters = {"pruned": pruned}
    truths = ask_oracle(checkpoint, adapters, [("pruned", prompt) for prompt in prompts(2)])
    assert_equal_to_peft(engine_for(checkpoint, adapters), truths)


def test_the_rank_that_it_began_with_is_content(case: tuple[Path, Path]) -> None:
    checkpoint, pruned = case
    base = float_base(checkpoint).spec
    first = read(files_of(pruned), base, ReadLimits()).spec.digest
    edit_config(pruned, init_r=12)
    assert read(files_of(pruned), base, ReadLimits()).spec.digest != first
    edit_config(pruned, init_r=6)
