"""When a failed call may be tried again, and after how long. Pure decisions; the clients sleep.

A call that changes nothing, or the same thing twice, is repeated when the server could not be reached
or asked for it; any other call only where the server says, by RetryInfo, that it did not start it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lorica.errors import LoricaError, ResourceExhausted, Unavailable


@dataclass(frozen=True)
class RetryPolicy:
    """Bounds: at most `attempts` calls in all; pauses double from `first` to `longest` seconds.

    A RetryInfo longer than `longest` is not waited for: the caller hears of it instead.
    """

    attempts: int = 4
    first: float = 0.1
    longest: float = 5.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first < 0 or self.longest < self.first:
            raise ValueError("a retry policy needs attempts >= 1 and 0 <= first <= longest")

    def pause(self, error: LoricaError, attempt: int, *, idempotent: bool) -> float | None:
        """Seconds to wait after failed attempt number `attempt` (from 1), or None to give up."""
        if attempt >= self.attempts or not isinstance(error, Unavailable | ResourceExhausted):
            return None
        if error.retry_after is not None:
            return error.retry_after if error.retry_after <= self.longest else None
        if not idempotent or not isinstance(error, Unavailable):
            return None
        longest = min(self.longest, self.first * float(2 ** (attempt - 1)))
        return longest * random.uniform(0.5, 1.0)  # spread, so that many clients do not return at once


NO_RETRY = RetryPolicy(attempts=1)
