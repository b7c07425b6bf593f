"""Every method that adapts linear maps, in one mixed batch: PEFT alone, on the dequantized base, is right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.against_peft import Truth, assert_equal_to_peft, engine_for, prompts
from support.checkpoints import save_checkpoint, wide_model
from support.kinds import ask_oracle, assert_each_changes_what_is_said
from support.module_kinds import butterflies, kinds_for, make_module_kind

ARCHITECTURES = ("llama", "qwen2", "gpt2")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, Path]]]:
    architecture: str = request.param
    root = tmp_path_factory.mktemp("case")
    checkpoint = save_checkpoint(wide_model(architecture), root / "base")
    with butterflies():
        yield (
            checkpoint,
            {name: make_module_kind(checkpoint, root / name, name, architecture) for name in kinds_for(architecture)},
        )


@pytest.fixture(scope="module")
def truths(case: tuple[Path, dict[str, Path]]) -> list[Truth]:
    checkpoint, adapters = case
    names = [None, *adapters]
    return ask_oracle(checkpoint, adapters, list(zip(names, prompts(len(names), step=2), strict=True)))


@pytest.mark.parametrize("options", [{}, {"deterministic": True}], ids=["plain", "deterministic"])
def test_a_mixed_batch_equals_peft_alone(
    case: tuple[Path, dict[str, Path]], truths: list[Truth], options: dict[str, bool]
) -> None:
    checkpoint, adapters = case
    assert_equal_to_peft(engine_for(checkpoint, adapters, capacity=1024, **options), truths)


def test_each_of_them_changes_what_is_said(case: tuple[Path, dict[str, Path]], truths: list[Truth]) -> None:
    assert_each_changes_what_is_said(case[0], truths)
