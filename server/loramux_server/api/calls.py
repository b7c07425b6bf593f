"""What a caller asks of the server, in plain values: every transport reads its requests into these.

Nothing here is checked yet: `validate` checks it. A field that the caller left out has its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loramux_server.requests import SamplingParams, StopConditions


@dataclass(frozen=True)
class ChatTurn:
    """One message of a conversation. `whole` is set when it has more than a role and a content string."""

    role: str
    content: str
    whole: Mapping[str, Any] | None = None
    size: int = 0  # characters of `whole` as it came

    def message(self) -> dict[str, Any]:
        """As the chat template gets it."""
        return {"role": self.role, "content": self.content} if self.whole is None else dict(self.whole)

    @property
    def characters(self) -> int:
        """How much there is to render, at most."""
        return max(len(self.content), self.size)


Tools = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class ResponseOptions:
    """What the answer shows beside its text."""

    token_ids: bool = False
    echo: bool = False  # the text starts with the prompt


@dataclass(frozen=True)
class GenerateCall:
    """One generation; exactly one of `text`, `token_ids` and `chat` is set in a valid call, and of `adapter` and
    `adapters` one at most.

    `seed` and `max_tokens` are the server's to choose where they are None; those of `sampling` and `stop` that follow
    from the base or from other fields are set when the call is accepted.
    """

    request_id: str = ""
    adapter: str = ""
    adapters: tuple[tuple[str, float], ...] = ()  # several in its place, each with its weight
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    chat: tuple[ChatTurn, ...] | None = None
    tools: Tools = ()  # for the chat template
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: StopConditions = field(default_factory=StopConditions)
    response: ResponseOptions = ResponseOptions()
    n: int = 1
    seed: int | None = None
    max_tokens: int | None = None
    priority: int = 0
    cache_salt: str = ""
