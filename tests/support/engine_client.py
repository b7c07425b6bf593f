"""What an EngineClient has under way, for tests that wait for its end."""

from __future__ import annotations

from loramux_server.engine.client import EngineClient


def count_submissions(client: EngineClient) -> int:
    """Submissions that the engine has not ended."""
    return len(client._tickets)


def count_choices(client: EngineClient) -> int:
    """Their choices that have not ended; what `max_live` bounds."""
    return client._live
