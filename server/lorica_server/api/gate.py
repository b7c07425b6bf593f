"""Whether the server takes new work. Services ask before they begin; running work is not asked again."""

from __future__ import annotations

from enum import Enum

from lorica_server.errors import Draining, Unavailable


class Phase(Enum):
    """What the server does with new work."""

    WARMING = "warming"
    SERVING = "serving"
    DRAINING = "draining"


class Gate:
    """One per server, moved by whoever starts and stops it."""

    def __init__(self) -> None:
        self.phase = Phase.WARMING

    def enter(self) -> None:
        """Raise Unavailable while warming, Draining while stopping."""
        if self.phase is Phase.WARMING:
            raise Unavailable("the server is warming up")
        if self.phase is Phase.DRAINING:
            raise Draining()
