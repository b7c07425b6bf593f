"""Waiting for the desired state: the server merges in the background."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from loramux.errors import DeadlineExceeded

if TYPE_CHECKING:
    from loramux.client import Client
    from loramux.types import Adapter


def wait_merged(client: Client, adapter: Adapter, *, seconds: float, poll: float = 0.1) -> Adapter:
    """The adapter once its merged weights are ready or refused. Raises DeadlineExceeded."""
    deadline = time.monotonic() + seconds
    while adapter.residency.merged not in ("ready", "refused"):
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"{adapter.name} is still {adapter.residency.merged} after {seconds:g} s")
        time.sleep(poll)
        adapter = client.adapter(adapter.name)
    return adapter
