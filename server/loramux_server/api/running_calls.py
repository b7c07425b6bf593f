"""The calls under way, so that a stop can wait for them, and end those that are left with a status of ours.

Knows no service. gRPC's own stop ends with CANCELLED whatever is still open: clients take that for their own doing, and
do not try elsewhere.
"""

from __future__ import annotations

import asyncio
from typing import Any


class RunningCalls:
    """One per server, on its event loop. A call is the task that serves it, from its handler to its status sent."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], bool] = {}  # whether the call ends by itself
        self._ended: set[asyncio.Task[Any]] = set()

    def enter(self, *, endless: bool) -> None:
        """The current task serves a call; `endless` ones (a watch) are not waited for."""
        task = asyncio.current_task()
        if task is not None and task not in self._tasks:
            self._tasks[task] = not endless
            task.add_done_callback(self._discard)

    def take_ended(self) -> bool:
        """Whether the current task was cancelled by `end`; it goes on then, and gives its caller a status."""
        task = asyncio.current_task()
        if task is None or task not in self._ended:
            return False
        self._ended.discard(task)
        task.uncancel()
        return True

    async def end(self, seconds: float, status_seconds: float = 1.0) -> int:
        """Wait for calls to end by themselves; after `seconds` cancel the rest, and wait for their statuses.

        Returns the number of those cancelled that were waited for.
        """
        finite = [task for task, ends in self._tasks.items() if ends]
        if finite and seconds > 0:
            await asyncio.wait(finite, timeout=seconds)
        left = [task for task in self._tasks if not task.done()]
        cut_off = sum(self._tasks[task] for task in left)
        for task in left:
            self._ended.add(task)
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=status_seconds)
        return cut_off

    def _discard(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        self._ended.discard(task)
