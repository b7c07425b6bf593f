"""Signals as a flag."""

import signal

import pytest

from loramux_trainer.interrupt import stop_on_signals


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_closed_terminal_stops_and_hurries_nobody(number: signal.Signals) -> None:
    heard: list[str] = []
    before = signal.signal(number, lambda *_: heard.append("before"))
    try:
        with stop_on_signals(lambda: heard.append("stop")) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.is_set()
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGHUP)
            assert heard == ["stop"]
            signal.raise_signal(number)
        assert heard == ["stop", "before"]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_nohup_stays() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)
