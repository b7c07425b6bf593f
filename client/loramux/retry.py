"""When a failed call may be tried again, and after how long. Decisions only; the clients sleep.

A call that changes nothing, or the same thing twice, is repeated when the server could not be reached
or asked for it; any other call only where the server says, by RetryInfo, that it did not start it.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass

from loramux.errors import DeadlineExceeded, LoramuxError, ResourceExhausted, Unavailable


@dataclass(frozen=True)
class RetryPolicy:
    """Bounds: at most `attempts` calls in all; pauses double from `first` to `longest` seconds.

    A RetryInfo longer than `longest` is not waited for: the caller gets the error.
    """

    attempts: int = 4
    first: float = 0.1
    longest: float = 5.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first < 0 or self.longest < self.first:
            raise ValueError("a retry policy needs attempts >= 1 and 0 <= first <= longest")

    def is_counted(self, error: LoramuxError) -> bool:
        """Whether a failure uses up one of the attempts; waiting for what ends by itself may not."""
        return True

    def pause(self, error: LoramuxError, attempt: int, *, idempotent: bool, left: float | None = None) -> float | None:
        """Seconds to wait after failed attempt number `attempt` (from 1), or None to give up.

        `left`: seconds of the caller's own time for the whole call, None without a limit. A pause that is not shorter
        is not made: the caller gets the error.
        """
        if attempt >= self.attempts or not isinstance(error, Unavailable | ResourceExhausted):
            return None
        if error.retry_after is not None:
            return error.retry_after if error.retry_after <= self.longest else None
        if not idempotent or not isinstance(error, Unavailable):
            return None
        return self.spread(attempt)

    def spread(self, attempt: int) -> float:
        """Seconds after failed attempt number `attempt`, so that many clients do not return at once."""
        return min(self.longest, self.first * float(2 ** (attempt - 1))) * random.uniform(0.5, 1.0)


NO_RETRY = RetryPolicy(attempts=1)


class Attempts:
    """The tries of one call: how many have failed, and what is left of the caller's time.

    `timeout` is for all tries and the pauses between them, `each` for every single try; None is no limit.
    """

    def __init__(self, policy: RetryPolicy, timeout: float | None = None, *, each: float | None = None) -> None:
        self._policy, self._each = policy, each
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._failed: Counter[bool] = Counter()  # counted ones, and waits that are not
        self._reason: LoramuxError | None = None  # what the last try but those cut by the deadline failed of

    def left(self) -> float | None:
        """Seconds that the next try may take."""
        if self._deadline is None:
            return self._each
        left = max(0.0, self._deadline - time.monotonic())
        return left if self._each is None else min(left, self._each)

    def pause(self, error: LoramuxError, *, idempotent: bool, moved: bool = False) -> float:
        """Seconds to wait before the next try. Where there is none, raises `error`, from what the try before it failed
        of if this one was cut by the caller's own deadline: the server may have been at work on it.

        `moved` means that the call met a state which another attempt changed: the next one finds it settled.
        """
        if isinstance(error, DeadlineExceeded) and self._deadline is not None:
            raise error from self._reason
        self._reason = error
        counted = self._policy.is_counted(error)
        self._failed[counted] += 1
        attempt = self._failed[counted]
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if moved:
            pause = self._policy.spread(attempt) if attempt < self._policy.attempts else None
        else:
            pause = self._policy.pause(error, attempt, idempotent=idempotent, left=left)
        if pause is None or (left is not None and pause >= left):
            raise error
        return pause
