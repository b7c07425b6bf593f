"""The mailbox: order, wake-ups, bounds and the end."""

from __future__ import annotations

import threading
import time

import pytest

from loramux_server.engine.mailbox import Abort, Command, Mailbox, MailboxClosed, MailboxFull, Submit
from support.scheduler_harness import submission


def test_commands_come_in_order_and_once():
    mailbox = Mailbox(4)
    commands: list[Command] = [Submit(1, submission(), 0.0), Abort(1), Abort(2)]
    for command in commands:
        mailbox.put(command)
    assert mailbox.take(0.0) == commands
    assert mailbox.take(0.0) == []


def test_submissions_are_bounded_and_aborts_are_not():
    mailbox = Mailbox(1)
    mailbox.put(Submit(1, submission(), 0.0))
    with pytest.raises(MailboxFull):
        mailbox.put(Submit(2, submission(), 0.0))
    for ticket in range(50):
        mailbox.put(Abort(ticket))
    assert len(mailbox.take(0.0)) == 51
    mailbox.put(Submit(2, submission(), 0.0))


def test_a_closed_mailbox_takes_nothing():
    mailbox = Mailbox(1)
    mailbox.put(Abort(1))
    mailbox.close()
    assert mailbox.take(0.0) == []
    with pytest.raises(MailboxClosed):
        mailbox.put(Abort(1))
    mailbox.notify()


@pytest.mark.parametrize("wake", ["put", "notify"])
def test_a_sleeping_reader_is_woken(wake: str):
    mailbox = Mailbox(1)
    taken: list[list[Command]] = []
    reader = threading.Thread(target=lambda: taken.append(mailbox.take(30.0)))
    reader.start()
    started = time.monotonic()
    if wake == "put":
        mailbox.put(Abort(7))
    else:
        mailbox.notify()
    reader.join(20.0)
    assert not reader.is_alive()
    assert time.monotonic() - started < 20.0
    assert taken == [[Abort(7)] if wake == "put" else []]


def test_a_wake_up_before_the_sleep_is_not_lost():
    mailbox = Mailbox(1)
    mailbox.notify()
    started = time.monotonic()
    mailbox.take(30.0)
    assert time.monotonic() - started < 20.0


def test_a_quiet_mailbox_is_waited_for_and_given_up():
    mailbox = Mailbox(1)
    started = time.monotonic()
    assert mailbox.take(0.02) == []
    assert time.monotonic() - started >= 0.015
