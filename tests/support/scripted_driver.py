"""A bench's driver without a model: tokens at fixed times, and a memory of what was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from loramux.bench.driver import EVICTIONS, LOADS, PROCESSOR_SECONDS, Call, Push, Trace


class ScriptedDriver:
    """Answers each call with tokens a millisecond apart; each run takes a turn of the loop, and each call one load."""

    name = "scripted"

    def __init__(self, short: bool = False) -> None:
        self.runs: list[tuple[str, list[Call]]] = []
        self.lengths: list[int] = []
        self.pushes: list[tuple[str, bytes]] = []
        self.closed = 0
        self.most_at_once = 0
        self._at_once = 0
        self._short = short

    async def start(self) -> None:
        pass

    async def run(self, calls: Sequence[Call], output_tokens: int, salt: str) -> list[Trace]:
        self.runs.append((salt, list(calls)))
        self.lengths.append(output_tokens)
        self._at_once += len(calls)
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(0)
        self._at_once -= len(calls)
        counts = [(call.output_tokens or output_tokens) - self._short for call in calls]
        return [Trace(0.0, tuple(0.001 * (i + 1) for i in range(count))) for count in counts]

    async def push(self, path: Path, name: str) -> Push:
        self.pushes.append((name, (path / "adapter_model.safetensors").read_bytes()))
        number = len(self.pushes)
        return Push(number, 10.0 * number, 10.0 * number + 2.0, 10.0 * number + 3.0)

    def stages_of(self, push: Push, first: Trace) -> Mapping[str, float]:
        return {"load": 0.25 * push.adapter}

    def readings(self) -> Mapping[str, float]:
        loads = sum(len(calls) for _, calls in self.runs)
        return {LOADS: loads, EVICTIONS: loads // 2, PROCESSOR_SECONDS: 0.5 * loads}

    async def close(self) -> None:
        self.closed += 1
