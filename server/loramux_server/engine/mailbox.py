"""The border between asyncio and the engine thread: commands in, a wake-up, nothing else.

Knows neither side. Commands are frozen values; a second process could stand behind it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from loramux_server.requests import Submission


class MailboxClosed(Exception):
    """The engine has ended and takes nothing more."""


class MailboxFull(Exception):
    """More submissions lie unread than the mailbox holds."""


@dataclass(frozen=True)
class Submit:
    """Start `submission`. `ticket` names it for ever: it grows with each submission of a client."""

    ticket: int
    submission: Submission
    arrived: float  # monotonic


@dataclass(frozen=True)
class Abort:
    """End every choice of `ticket` with ABORTED."""

    ticket: int


@dataclass(frozen=True)
class Finish:
    """End one choice with STOP: the client side found a stop string."""

    ticket: int
    choice: int


@dataclass(frozen=True)
class Stop:
    """End the engine when nothing is left to do, or at `by` (monotonic) with what is left ABORTED."""

    by: float


Command = Submit | Abort | Finish | Stop


class Mailbox:
    """Commands for one reader. Only submissions count against `capacity`: what ends work is never refused."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._condition = threading.Condition()
        self._commands: list[Command] = []
        self._submissions = 0
        self._woken = False
        self._closed = False

    def put(self, command: Command) -> None:
        """Leave `command` and wake the reader. Raises MailboxClosed or MailboxFull."""
        with self._condition:
            if self._closed:
                raise MailboxClosed
            if isinstance(command, Submit):
                if self._submissions >= self._capacity:
                    raise MailboxFull
                self._submissions += 1
            self._commands.append(command)
            self._condition.notify()

    def notify(self) -> None:
        """Wake the reader without a command: something it looks at has changed. From any thread, also when closed."""
        with self._condition:
            self._woken = True
            self._condition.notify()

    def take(self, timeout: float) -> list[Command]:
        """All commands in order. Waits up to `timeout` seconds for a command or a wake-up when there is neither."""
        with self._condition:
            if timeout > 0 and not self._commands and not self._woken:
                self._condition.wait(timeout)
            self._woken = False
            self._submissions = 0
            commands, self._commands = self._commands, []
            return commands

    def close(self) -> None:
        """Refuse everything from now on and drop what is unread; the client side knows whom to tell."""
        with self._condition:
            self._closed = True
            self._commands.clear()
            self._submissions = 0
