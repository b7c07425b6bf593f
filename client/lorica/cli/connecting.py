"""How commands reach a server: the usual retries, and patience with one that is still loading its base."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from lorica.client import Client
from lorica.errors import LoricaError
from lorica.retry import RetryPolicy
from lorica.terminal.output import say

PATIENCE = 60.0
"""Seconds that a command waits for a server to warm up."""

_WARMING_UP = "WARMING_UP"
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class WarmUpPatience(RetryPolicy):
    """The usual policy, but a server that says it is warming up is asked again for `seconds` after `began`.

    These waits use up none of the attempts: a server that has just become ready may still be busy.
    """

    seconds: float = PATIENCE
    began: float = field(default_factory=time.monotonic)

    def is_counted(self, error: LoricaError) -> bool:
        """All but warming up."""
        return error.reason != _WARMING_UP

    def pause(self, error: LoricaError, attempt: int, *, idempotent: bool) -> float | None:
        """As the usual policy, warming up aside; the first wait is announced on stderr."""
        if self.is_counted(error):
            return super().pause(error, attempt, idempotent=idempotent)
        left = self.began + self.seconds - time.monotonic()
        if left <= 0:
            return None
        if attempt == 1:
            say(f"the server is warming up; waiting up to {left:.0f} s for it")
        return min(left, _POLL_SECONDS)


def connect(address: str) -> Client:
    """A client for a command."""
    return Client(address, retry=WarmUpPatience())
