"""The driver for PEFT's mixed-batch generate, in a process of its own so that no state is shared with ours.

Between its turns the process waits on a pipe and takes no processor.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loramux.bench.driver import Call, DriverFailed, Trace


class PeftDriver:
    """Talks to `loramux.bench.peft_peer` in JSON lines."""

    name = "peft"

    def __init__(self, model: Path, adapters: Sequence[Path], *, threads: int, dtype: str, log: Path) -> None:
        self._setup = {"model": str(model), "adapters": [str(path) for path in adapters], "dtype": dtype}
        self._threads = threads
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    async def start(self) -> None:
        self._process = await asyncio.to_thread(self._spawn)
        await self._ask(self._setup)

    def _spawn(self) -> subprocess.Popen[str]:
        environ = {**os.environ, "OMP_NUM_THREADS": str(self._threads), "TOKENIZERS_PARALLELISM": "false"}
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "loramux.bench.peft_peer"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environ,
                start_new_session=True,
            )

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
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            with contextlib.suppress(OSError):  # it flushes: a peer that died has broken the pipe, and that was told
                process.stdin.close()
        try:
            await asyncio.to_thread(process.wait, 10)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
        if process.stdout is not None:
            process.stdout.close()

    async def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        return await asyncio.to_thread(self._exchange, json.dumps(question))

    def _exchange(self, line: str) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError("the driver was not started")
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            tail = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
            raise DriverFailed("the PEFT peer ended:\n" + "\n".join(tail))
        values: dict[str, Any] = json.loads(answer)
        return values
