"""Merged adapters of a ModelEngine with a worker's share that is done when a test says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loramux_adapters.apply.batch import MergedWeights
from loramux_adapters.apply.merge import merged_bytes
from loramux_adapters.weights import AdapterWeights
from loramux_server.model.merged_weights import MergedWeightsCache, TryOut
from loramux_server.model.merging import Merges
from support.against_peft import engine_for
from support.checkpoints import make_adapter_for, save_checkpoint, wide_model
from support.model_engine import ModelEngine


def small_engine(root: Path) -> ModelEngine:
    """A Llama with the adapters a, b and c on its query projections."""
    checkpoint = save_checkpoint(wide_model("llama"), root / "base")
    adapters = {
        name: make_adapter_for(checkpoint, root / name, seed=seed, r=4, target_modules=["q_proj"])
        for seed, name in enumerate("abc")
    }
    return engine_for(checkpoint, adapters)


def in_order(engine: ModelEngine) -> list[str]:
    """The digests in the order in which one desired state for all is fulfilled."""
    return sorted(engine.digests.values())


class Sets(MergedWeightsCache):
    """With a worker's share, done when a test says so."""

    def __init__(
        self,
        engine: ModelEngine,
        load: Callable[[str], AdapterWeights],
        budget: int,
        refusal: str,
        try_out: TryOut | None = None,
    ) -> None:
        self.merges = Merges(engine.adapted)
        self.notices = 0
        super().__init__(
            self.merges, lambda w: merged_bytes(engine.adapted, w), load, self.notice, budget, refusal, try_out
        )

    def notice(self) -> None:
        self.notices += 1

    def find(self, digest: str) -> MergedWeights | None:
        held = [merge for merge in self.merges._begun.values() if merge.digest == digest]
        assert len(held) < 2
        return held[0].result if held else None

    def wait(self) -> None:
        """For the reads asked for so far."""
        self._loader.submit(lambda: None).result(60)

    def take(self) -> bool:
        """As the worker does with a plan's commands; whether there were any."""
        drop, begin = self.take_merges()
        for number in drop:
            self.merges.drop(number)
        for merge in begin:
            self.merges.begin(merge)
        return bool(drop or begin)


def settle(sets: Sets) -> None:
    """Until nothing is left to do of what was asked for so far."""
    is_changed = True
    while is_changed:
        sets.wait()
        is_changed = sets.take()
        while not sets.merges.is_empty:
            sets.merges.advance()
