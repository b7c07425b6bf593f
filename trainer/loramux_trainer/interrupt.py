"""SIGTERM, SIGINT and SIGHUP as a flag that the loop reads between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_signals(on_first: Callable[[], None] = lambda: None) -> Iterator[threading.Event]:
    """An event that is set by SIGTERM, SIGINT or SIGHUP; a second SIGTERM or SIGINT acts as before. For the main thread
    only. Under nohup SIGHUP stays ignored.

    `on_first` is called by the handler of the first, in the middle of whatever was running.
    """
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    if before[signal.SIGHUP] == signal.SIG_IGN:
        del before[signal.SIGHUP]

    def restore(numbers: Iterable[signal.Signals]) -> None:
        for number in numbers:
            signal.signal(number, before[number])

    def on_signal(number: int, _frame: object) -> None:
        is_first = not stop.is_set()
        stop.set()
        # A terminal that closes sends SIGHUP beside another signal, or twice, in any order: one request.
        if number != signal.SIGHUP:
            restore((signal.SIGTERM, signal.SIGINT))
        if is_first:
            on_first()

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        restore(before)
