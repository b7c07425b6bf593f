"""Signals as a flag."""

import signal

import pytest

from lorica_trainer.interrupt import stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_heard_and_the_second_acts_as_before(number: signal.Signals) -> None:
    heard: list[str] = []
    before = signal.signal(number, lambda *_: heard.append("before"))
    try:
        with stop_on_signals(lambda: heard.append("stop")) as stop:
            assert not stop.is_set()
            signal.raise_signal(number)
            assert stop.is_set()
            signal.raise_signal(number)
        assert heard == ["stop", "before"]
    finally:
        signal.signal(number, before)
