"""SIGTERM and SIGINT as a flag that the loop reads between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_signals(heard: Callable[[], None] = lambda: None) -> Iterator[threading.Event]:
    """An event that is set by the first SIGTERM or SIGINT; a second one acts as before. For the main thread only.

    `heard` is called by the handler, in the middle of whatever was running.
    """
    stop = threading.Event()
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in signals}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(_number: int, _frame: object) -> None:
        stop.set()
        restore()
        heard()

    for number in signals:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        restore()
