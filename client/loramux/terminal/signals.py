"""SIGTERM and SIGHUP unwind like Ctrl-C, so that what a command started goes away with it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP do what SIGINT does; a SIGHUP that is ignored (nohup) stays so.

    In an asyncio loop that is to cancel its main task: an exception raised wherever the signal finds the loop may
    leave gRPC's compiled code half done, and the process ended with a segmentation fault at times. For the main thread
    only.
    """

    def interrupt(_number: int, frame: FrameType | None) -> None:
        # A terminal that closes may say so twice, by its shell and by the kernel: once is enough to end.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        act = signal.getsignal(signal.SIGINT)
        if callable(act):
            act(signal.SIGINT, frame)
        else:  # ignored, in the background of a script
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
