"""Our trainer in a process of its own: members on random tokens, all in one fleet or one fleet after the other.

Run as a module; see `peer`. Every token is supervised, and every member has its own data, weights and optimizer.
"""

from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path
from typing import Any

from loramux_adapters.threads import limit_spinning

limit_spinning()  # before torch, as `loramux train` does

import torch  # noqa: E402

from loramux.bench.peer import Answer, answer_lines  # noqa: E402
from loramux_adapters.base.load import load_base  # noqa: E402
from loramux_adapters.guard.examine import examine  # noqa: E402
from loramux_trainer.batches import StepOrder  # noqa: E402
from loramux_trainer.data.examples import Example, Unit  # noqa: E402
from loramux_trainer.fleet.fleet import Fleet  # noqa: E402
from loramux_trainer.fleet.member import Member, MemberOptions  # noqa: E402
from loramux_trainer.fleet.model import FleetModel  # noqa: E402
from loramux_trainer.losses.sft import SftLoss  # noqa: E402
from loramux_trainer.methods.low_rank import lora  # noqa: E402
from loramux_trainer.methods.rules import BaseValues  # noqa: E402
from loramux_trainer.methods.trained import TrainedAdapter  # noqa: E402
from loramux_trainer.optimizers.build import build_optimizer  # noqa: E402
from loramux_trainer.schema.optim_config import OptimConfig  # noqa: E402

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_EXAMPLES = 4  # of each member, read in turn


class TrainPeer:
    """Members are made when they are first asked for, and kept."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._base = load_base(setup["model"], compute_dtype=torch.float32)
        examined = examine(self._base, min(self._base.spec.context_length, setup["longest"]))
        self.model = FleetModel(self._base, examined, frozen_products=getattr(torch, setup["products"]))
        self._rank, self._seed, self._budget = setup["rank"], setup["seed"], setup["token_budget"]
        self._rows, self._rate = setup["rows"], setup["rate"]
        self._values = BaseValues(self._base)
        self._members: dict[int, list[Member]] = {}

    def members(self, count: int, tokens: int) -> list[Member]:
        """The first `count`, whose examples have so many tokens."""
        made = self._members.setdefault(tokens, [])
        while len(made) < count:
            made.append(self._make(len(made), tokens))
        return made[:count]

    def fleet(self, members: list[Member]) -> Fleet:
        """With these in it."""
        fleet = Fleet(self.model, token_budget=self._budget)
        for member in members:
            fleet.admit(member)
        return fleet

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """One step of each member ("step"), or admission until all are there ("grow")."""
        torch.set_num_threads(message["threads"])
        return self._grow(message) if message["ask"] == "grow" else self._step(message)

    def _step(self, message: dict[str, Any]) -> dict[str, Any]:
        members = self.members(message["members"], message["tokens"])
        fleets = [self.fleet(members)] if message["fused"] else [self.fleet([member]) for member in members]
        stepped, clocks = 0, _clocks()
        for fleet in fleets:
            stepped += len(fleet.step())
        return {"stepped": stepped, **_since(clocks)}

    def _grow(self, message: dict[str, Any]) -> dict[str, Any]:
        """Admits `admitted` members before each step until there are `members`, then takes `steps` more."""
        fleet, steps, full = self.fleet([]), list[dict[str, float]](), 0
        while full < message["steps"]:
            there = len(fleet.members)
            for member in self.members(min(there + message["admitted"], message["members"]), message["tokens"])[there:]:
                fleet.admit(member)
            full += len(fleet.members) == message["members"]
            clocks = _clocks()
            stepped = len(fleet.step())
            steps.append({"stepped": stepped, **_since(clocks)})
        return {"steps": steps, "peak_bytes": _peak_bytes()}

    def _make(self, number: int, tokens: int) -> Member:
        draw = random.Random(f"{self._seed}/{tokens}/{number}")
        units = [Unit((self._example(draw, tokens),)) for _ in range(_EXAMPLES * self._rows)]
        config = {
            "task_type": "CAUSAL_LM", "target_modules": list(TARGETS), "r": self._rank, "lora_alpha": 2 * self._rank,
        }  # fmt: skip
        return Member(
            f"member-{number}",
            TrainedAdapter(lora(config, number, self._values), self._base.spec, self._base.device),
            SftLoss(),
            partial(build_optimizer, OptimConfig(learning_rate=self._rate)),
            StepOrder([tokens] * len(units), batch_size=self._rows, accumulation=1, seed=number),
            units,
            (),
            MemberOptions(2**31, lambda step: self._rate, seed=number),
        )

    def _example(self, draw: random.Random, tokens: int) -> Example:
        ids = tuple(draw.randrange(3, self._base.spec.vocab_size) for _ in range(tokens))
        return Example(ids, ids)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(clocks: tuple[float, float]) -> dict[str, float]:
    wall, processor = _clocks()
    return {"wall_seconds": wall - clocks[0], "processor_seconds": processor - clocks[1]}


def _peak_bytes() -> int | None:
    """The most memory this process had at once, None where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else None


def _make(setup: dict[str, Any]) -> Answer:
    return TrainPeer(setup).answer


if __name__ == "__main__":
    answer_lines(_make)
