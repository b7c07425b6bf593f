"""The order of a measurement of training: every process makes ready, then rounds in which cells and systems alternate.

A system is a way to take one step of K members. What drifts over minutes on a shared machine meets all alike; ratios
are taken inside a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.bench.driver import DriverFailed
from loramux.bench.peer import Peer
from loramux.bench.session import round_order
from loramux.bench.train_workload import Cell, CountWorkload, Products, SpeedWorkload

Announce = Callable[[str], None]
RATE = 1e-4
"""The learning rate of all."""


@dataclass(frozen=True)
class System:
    """A way to train; `products` None: PEFT's, which computes all in float32."""

    name: str
    products: Products | None
    fused: bool


PEFT = System("PEFT", None, fused=False)


@dataclass(frozen=True)
class StepSample:
    """One step of each member of a cell, by one system in one round."""

    system: System
    cell: Cell
    round_number: int
    tokens: int
    wall_seconds: float
    processor_seconds: float

    @property
    def seconds(self) -> float:
        """By the processor's clock on one thread, which others on the machine disturb less, else by the wall's."""
        return self.processor_seconds if self.cell.threads == 1 else self.wall_seconds

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Ratio:
    """What one system has over another in the same round: the median over rounds, and the extremes."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class CellSummary:
    """A cell over all rounds: tokens per second by system, and ratios of two systems by their names."""

    cell: Cell
    rates: Mapping[str, float]
    ratios: Mapping[tuple[str, str], Ratio]


@dataclass(frozen=True)
class CountResult:
    """A fleet of so many: the steps from the first admission on, and the most memory its process had at once."""

    members: int
    steps: Sequence[Mapping[str, float]]  # stepped (members), wall_seconds, processor_seconds
    peak_bytes: int | None


def systems_of(workload: SpeedWorkload, *, peft: bool) -> list[System]:
    """What is compared."""
    found = []
    for products in workload.frozen_products:
        suffix = "" if products == "float32" else f", {products} products"
        found += [System(f"fleet{suffix}", products, True), System(f"one by one{suffix}", products, False)]
    return [*found, PEFT] if peft else found


def compared(systems: Sequence[System]) -> list[tuple[System, System]]:
    """The pairs whose ratios are told: each fleet over our own one by one, and over PEFT."""
    found = []
    for system in systems:
        if system.fused:
            alone = [other for other in systems if not other.fused and other.products == system.products]
            found += [(system, other) for other in (*alone, *(other for other in systems if other is PEFT))]
    return found


def measure_speed(
    workload: SpeedWorkload, systems: Sequence[System], model: Path, scratch: Path, announce: Announce
) -> list[StepSample]:
    """All samples of the measured rounds; those of the first rounds, which warm up, are forgotten."""
    samples = []
    with ExitStack() as stack:
        peers: dict[Products | None, Peer] = {}
        for products in dict.fromkeys(system.products for system in systems):
            peers[products] = _start(stack, products, max(workload.threads), scratch)
        for products, peer in peers.items():
            announce(f"loading for {products or 'PEFT'}")
            peer.ask(_setup(workload, model, max(workload.tokens), products or "float32"))
        for number in range(workload.warmup + workload.rounds):
            for cell in round_order(workload.cells, number):
                for system in round_order(systems, number):
                    taken = _step(peers[system.products], system, cell, number, workload.rows)
                    phase = "warm-up" if number < workload.warmup else f"round {number - workload.warmup + 1}"
                    announce(f"{phase}: {cell.title}, {system.name} {taken.rate:.0f} tokens/s")
                    if number >= workload.warmup:
                        samples.append(taken)
    return samples


def measure_count(workload: CountWorkload, model: Path, scratch: Path, announce: Announce) -> list[CountResult]:
    """One member, then all, each in a process of its own, so that neither has the other's memory."""
    results = []
    for members in (1, workload.members):
        with ExitStack() as stack:
            peer = _start(stack, "float32", workload.threads, scratch)
            peer.ask(_setup(workload, model, workload.tokens, "float32"))
            announce(f"a fleet of {members}")
            question = {
                "ask": "grow", "members": members, "admitted": workload.admitted, "tokens": workload.tokens,
                "steps": workload.steps, "threads": workload.threads,
            }  # fmt: skip
            answer = peer.ask(question)
        last = answer["steps"][-1]["stepped"]
        if last != members:
            raise DriverFailed(f"{last} of {members} members took the last step")
        results.append(CountResult(members, answer["steps"], answer["peak_bytes"]))
    return results


def summarize_speed(samples: Sequence[StepSample], systems: Sequence[System]) -> list[CellSummary]:
    """One summary per cell, in order of appearance in the first round."""
    summaries = []
    for cell in sorted({entry.cell for entry in samples}, key=lambda cell: (cell.threads, cell.tokens, cell.members)):
        rates = {
            system: {
                entry.round_number: entry.rate for entry in samples if (entry.system, entry.cell) == (system, cell)
            }
            for system in systems
        }
        ratios = {}
        for one, other in compared(systems):
            each = [rates[one][number] / rates[other][number] for number in rates[one]]
            ratios[one.name, other.name] = Ratio(statistics.median(each), min(each), max(each))
        medians = {system.name: statistics.median(own.values()) for system, own in rates.items()}
        summaries.append(CellSummary(cell, medians, ratios))
    return summaries


def _start(stack: ExitStack, products: Products | None, threads: int, scratch: Path) -> Peer:
    name = products or "peft"
    module = f"loramux.bench.{'peft_' if products is None else ''}train_peer"
    peer = Peer(f"training ({name})", module, threads=threads, log=scratch / f"{name}.log")
    stack.callback(peer.close)
    return peer


def _setup(workload: SpeedWorkload | CountWorkload, model: Path, longest: int, products: str) -> dict[str, Any]:
    return {
        "model": str(model), "products": products, "longest": longest, "rank": workload.rank, "rows": workload.rows,
        "token_budget": workload.token_budget, "seed": workload.seed, "rate": RATE,
    }  # fmt: skip


def _step(peer: Peer, system: System, cell: Cell, number: int, rows: int) -> StepSample:
    question = {
        "ask": "step", "members": cell.members, "tokens": cell.tokens, "threads": cell.threads, "fused": system.fused,
    }  # fmt: skip
    answer = peer.ask(question)
    if answer["stepped"] != cell.members:
        raise DriverFailed(f"{system.name}: {answer['stepped']} of {cell.members} members took a step")
    tokens = cell.members * rows * cell.tokens
    return StepSample(system, cell, number, tokens, answer["wall_seconds"], answer["processor_seconds"])
