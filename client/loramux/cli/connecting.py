"""How commands reach a server: the usual retries, and longer waits for one that is starting or loading its base."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from loramux.channel import is_local
from loramux.client import Client
from loramux.errors import LoramuxError, Unavailable
from loramux.retry import RetryPolicy
from loramux.terminal.output import say

WARM_UP_SECONDS = 60.0
"""How long a command waits for a server to warm up."""

START_SECONDS = 5.0
"""How long a command waits for a server on this machine to listen: `loramux serve &` takes about one second for it."""

GENERATE_START_SECONDS = 30.0
"""The same for `loramux generate`, which is what one runs right behind `loramux serve &`, on a busy machine too."""

_WARMING_UP = "WARMING_UP"
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class StartRetryPolicy(RetryPolicy):
    """The usual policy, but a server that says it is warming up is asked again for `warm_up_seconds`, and one at
    `address` that does not listen for `start_seconds`, each from when it was first found so.

    These waits use up none of the attempts: a server that has just become ready may still be busy.
    """

    address: str = ""
    warm_up_seconds: float = WARM_UP_SECONDS
    start_seconds: float = 0.0
    _since: dict[str, float] = field(default_factory=dict)  # what is waited for -> first found so

    def is_counted(self, error: LoramuxError) -> bool:
        """All but warming up, and no server there where a start is waited for."""
        return error.reason != _WARMING_UP and not (self.start_seconds and _is_absent(error))

    def pause(self, error: LoramuxError, attempt: int, *, idempotent: bool, left: float | None = None) -> float | None:
        """As the usual policy, starting and warming up aside; the first wait for each is announced on stderr."""
        if self.is_counted(error):
            return super().pause(error, attempt, idempotent=idempotent, left=left)
        if _is_absent(error):
            state, seconds = f"no server is listening at {self.address} yet", self.start_seconds
        else:
            state, seconds = "the server is warming up", self.warm_up_seconds
        now = time.monotonic()
        is_new = state not in self._since
        to_wait = self._since.setdefault(state, now) + seconds - now
        pause = min(to_wait, _POLL_SECONDS)
        if pause <= 0 or (left is not None and pause >= left):
            return None
        if is_new:
            say(f"{state}; waiting up to {_seconds(to_wait if left is None else min(to_wait, left))} s for it")
        return pause


def connect(address: str, start_seconds: float | None = None) -> Client:
    """A client for a command. `start_seconds` None waits for a server on this machine alone, as commands do."""
    if start_seconds is None:
        start_seconds = START_SECONDS if is_local(address) else 0.0
    return Client(address, retry=StartRetryPolicy(address=address, start_seconds=start_seconds))


def generate_start_seconds(address: str) -> float:
    """How long `loramux generate` waits for a server at `address` to listen, without --wait."""
    return GENERATE_START_SECONDS if is_local(address) else 0.0


def _seconds(seconds: float) -> str:
    """For people: whole ones, or tenths of a few."""
    return f"{round(seconds, 1 if seconds < 10 else 0):g}"


def _is_absent(error: LoramuxError) -> bool:
    """Whether nothing listened: the call was never sent."""
    said = error.metadata.get("transport", "").lower()
    return isinstance(error, Unavailable) and ("connection refused" in said or "no such file" in said)
