"""The driver for PEFT's mixed-batch generate, in a process of its own so that no state is shared with ours."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loramux.bench.driver import Call, Trace
from loramux.bench.peer import Peer


class PeftDriver:
    """Talks to `loramux.bench.peft_peer`."""

    name = "peft"

    def __init__(self, model: Path, adapters: Sequence[Path], *, threads: int, dtype: str, log: Path) -> None:
        self._setup = {"model": str(model), "adapters": [str(path) for path in adapters], "dtype": dtype}
        self._make = partial(Peer, "PEFT", "loramux.bench.peft_peer", threads=threads, log=log)
        self._peer: Peer | None = None

    async def start(self) -> None:
        self._peer = await asyncio.to_thread(self._make)
        await self._ask(self._setup)

    def readings(self) -> Mapping[str, float]:
        return {}

    async def run(self, calls: Sequence[Call], output_tokens: int, salt: str) -> list[Trace]:
        answer = await self._ask(
            {
                "prompts": [call.prompt for call in calls],
                "adapters": [call.adapter for call in calls],
                "output_tokens": output_tokens,
            }
        )
        # One static batch: every row's tokens come together.
        arrivals = tuple(float(second) for second in answer["arrivals"])
        return [Trace(0.0, arrivals) for _ in calls]

    async def close(self) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            await asyncio.to_thread(peer.close)

    async def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._peer is None:
            raise RuntimeError("the driver was not started")
        return await asyncio.to_thread(self._peer.ask, question)
