"""SIGTERM and SIGHUP unwind like Ctrl-C, so that what a command started goes away with it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise KeyboardInterrupt; a SIGHUP that is ignored (nohup) stays so.

    For the main thread only.
    """

    def interrupt(_number: int, _frame: object) -> None:
        # A terminal that closes may say so twice, by its shell and by the kernel: once is enough to end.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
