"""What the services need of the rest of the server, as interfaces that the composition root fills.

Keeps the API free of the model, the tokenizer's library and the residency pool.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from loramux_adapters.certificate.replay import Replay
from loramux_adapters.spec import AdapterSpec, WeightCounts
from loramux_server.api.server_limits import ServerLimits

Tier = Literal["registered", "loaded", "resident"]
Merged = Literal["none", "building", "ready", "refused"]


class Tokenizer(Protocol):
    """Text to token ids and back, by the base's own tokenizer and chat template. Safe from any thread."""

    @property
    def template_digest(self) -> str:
        """sha256 of the chat template, empty when the base has none."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end a text."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Text -> id of every token that `decode` leaves out."""

    @property
    def longest_token(self) -> int:
        """Bytes of the longest piece of text one token can stand for."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, behind the special tokens the base expects there."""

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template does anything with tools."""

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        most_characters: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation rendered by the template, of at most so many characters.

        Raises ValueError when it refuses, a ChatRefused where the message at fault is known.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""

    def output_context(self, prompt: Sequence[int]) -> list[int]:
        """The ids of the prompt's end that an output's text is decoded behind."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for."""

    @property
    def waits(self) -> bool:
        """Whether rendering a conversation waits for another process, however short it is."""


class AdapterTokenizers(Protocol):
    """The tokenizers of adapters that bring their own."""

    async def tokenizer_of(
        self, spec: AdapterSpec | None, read: Callable[[], Awaitable[Mapping[str, bytes]]]
    ) -> Tokenizer:
        """The base's where there is no other; `read` gives the adapter's files when they are needed."""


@dataclass(frozen=True)
class AdapterState:
    """Where an adapter is now. `reason` says why merging was refused, `host_bytes` what it takes of host memory."""

    tier: Tier = "registered"
    slot: int | None = None
    leases: int = 0
    merged: Merged = "none"
    reason: str = ""
    host_bytes: int = 0
    merged_replay: Replay | None = None  # of its certificate through its merged weights


class AdapterObserver(Protocol):
    """Learns which name a digest is used by."""

    def named(self, digest: str, name: str) -> None: ...


class AdapterStates(Protocol):
    """Engine truth about adapters. Safe from any thread."""

    def state(self, digest: str) -> AdapterState:
        """Where the version is at this moment."""


@dataclass(frozen=True)
class ModelInfo:
    """The base as GetModel shows it."""

    model_id: str
    architecture: str
    fingerprint: str
    compute_dtype: str
    device: str
    deterministic: bool
    limits: ServerLimits
    weights: WeightCounts
