"""Waiting for a wish to come true: the server materialises in the background."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lorica.errors import DeadlineExceeded

if TYPE_CHECKING:
    from lorica.client import Client
    from lorica.types import Adapter


def wait_materialised(client: Client, adapter: Adapter, *, wanted: bool, seconds: float, poll: float = 0.1) -> Adapter:
    """The adapter once its dense copy is ready or refused (`wanted`), or gone. Raises DeadlineExceeded."""
    settled = ("ready", "refused") if wanted else ("none", "refused")
    deadline = time.monotonic() + seconds
    while adapter.residency.materialised not in settled:
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"{adapter.name} is still {adapter.residency.materialised} after {seconds:g} s")
        time.sleep(poll)
        adapter = client.adapter(adapter.name)
    return adapter
