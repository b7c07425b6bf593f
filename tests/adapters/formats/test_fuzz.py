"""A short run of `make fuzz`: files changed at random are read or refused, in time."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.all_kinds import make_all_kinds
from support.checkpoints import float_base, save_checkpoint, wide_model
from support.fuzz import Fuzzer


@pytest.mark.parametrize("seed", range(4))
def test_files_changed_at_random_are_read_or_refused(
    seed: int, fuzzed: tuple[dict[str, Path], Path], tmp_path: Path
) -> None:
    directories, checkpoint = fuzzed
    outcomes = Fuzzer(directories, float_base(checkpoint).spec, tmp_path, seed).run(300)
    assert outcomes.read > 0
    assert sum(outcomes.refused.values()) > 100
    assert not outcomes.slow


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path]:
    root = tmp_path_factory.mktemp("fuzz")
    checkpoint = save_checkpoint(wide_model("llama"), root / "base")
    return make_all_kinds(checkpoint, root / "kinds", "llama"), checkpoint
