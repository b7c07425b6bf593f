"""A small engine with three adapters for tests of the worker, and faults that come when they are wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loramux_adapters.binding import Binding
from loramux_adapters.errors import AdapterError
from loramux_adapters.residency.tiers import RankRanges
from loramux_adapters.weights import AdapterWeights
from support.against_peft import ask_peft, engine_for, prompts
from support.checkpoints import make_adapter_for, save_checkpoint, wide_model
from support.model_engine import ModelEngine


class Case:
    """A Llama with three adapters, and what PEFT says they answer."""

    def __init__(self, root: Path) -> None:
        self.checkpoint = save_checkpoint(wide_model("llama"), root / "base")
        self.adapters = {
            name: make_adapter_for(self.checkpoint, root / name, seed=seed, r=8, target_modules="all-linear")
            for seed, name in enumerate("abc")
        }
        rows = list(zip(["a", None, "b", "c"], prompts(4), strict=True))
        self.truths = ask_peft(self.checkpoint, self.adapters, rows, count=4)

    def engine(self, **options: Any) -> ModelEngine:
        return engine_for(self.checkpoint, self.adapters, **options)


def ignore(_: AdapterError | None) -> None:
    pass


def staged(engine: ModelEngine, name: str, slot: int) -> Binding:
    weights: AdapterWeights = engine.weights[engine.digests[name]]
    ranges: RankRanges = dict.fromkeys(weights.spec.ranks, (0, 8))
    engine.staged.stage(slot, weights, ranges, ignore)
    return Binding(slot, weights.spec.digest, ranges)


class Failing:
    """Calls through, but for the calls whose numbers (from 0) are given: these raise MemoryError."""

    def __init__(self, original: Any, *numbers: int) -> None:
        self._original, self._numbers, self.calls = original, set(numbers), 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls - 1 in self._numbers:
            raise MemoryError
        return self._original(*arguments)


def turns_until_resident(engine: ModelEngine, name: str) -> int:
    """Turns of the loop until an adapter is on the device."""
    for turn in range(1000):
        if engine.pool.residency(engine.digests[name]).tier == "resident":
            return turn
        engine.step()
    raise AssertionError("never resident")
