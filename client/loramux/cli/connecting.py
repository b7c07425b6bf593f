"""How commands reach a server: the usual retries, and patience with one that is starting or loading its base."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from loramux.channel import is_local
from loramux.client import Client
from loramux.errors import LoramuxError, Unavailable
from loramux.retry import RetryPolicy
from loramux.terminal.output import say

PATIENCE = 60.0
"""Seconds that a command waits for a server to warm up."""

START_SECONDS = 5.0
"""Seconds that a command waits for a server on this machine to listen: `loramux serve &` takes about one for it."""

_WARMING_UP = "WARMING_UP"
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class WarmUpPatience(RetryPolicy):
    """The usual policy, but a server that says it is warming up is asked again for `seconds` after `began`, and one
    that does not listen for `start_seconds`.

    These waits use up none of the attempts: a server that has just become ready may still be busy.
    """

    seconds: float = PATIENCE
    start_seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)
    _said: list[str] = field(default_factory=list)

    def is_counted(self, error: LoramuxError) -> bool:
        """All but warming up, and nobody there to take the call where a start is waited for."""
        return error.reason != _WARMING_UP and not (self.start_seconds and _is_absent(error))

    def pause(self, error: LoramuxError, attempt: int, *, idempotent: bool) -> float | None:
        """As the usual policy, starting and warming up aside; the first wait for each is announced on stderr."""
        if self.is_counted(error):
            return super().pause(error, attempt, idempotent=idempotent)
        absent = _is_absent(error)
        left = self.began + (self.start_seconds if absent else self.seconds) - time.monotonic()
        if left <= 0:
            return None
        state = "no server is listening yet" if absent else "the server is warming up"
        if state not in self._said:
            self._said.append(state)
            say(f"{state}; waiting up to {left:.0f} s for it")
        return min(left, _POLL_SECONDS)


def connect(address: str) -> Client:
    """A client for a command."""
    return Client(address, retry=WarmUpPatience(start_seconds=START_SECONDS if is_local(address) else 0.0))


def _is_absent(error: LoramuxError) -> bool:
    """Whether nobody listened: the call was never sent."""
    said = error.metadata.get("transport", "").lower()
    return isinstance(error, Unavailable) and ("connection refused" in said or "no such file" in said)
