"""What the client gives back: frozen values with plain Python types.

Knows no protobuf and no channel; `convert` fills these in. Times are aware datetimes in UTC,
sizes bytes, log-probabilities natural.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal, Required, TypedDict

FinishReason = Literal["stop", "length", "aborted"]
Tier = Literal["registered", "loaded", "resident"]
MergedState = Literal["none", "building", "ready", "refused"]
AdapterHealth = Literal["ok", "corrupt"]


class Message(TypedDict, total=False):
    """One turn of a chat. Calls take any mapping with a role: every key reaches the chat template as it is."""

    role: Required[str]  # "system", "user", "assistant" or "tool", as the template knows them
    content: Required[str | None]
    name: str
    reasoning_content: str
    tool_calls: Sequence[Mapping[str, object]]
    tool_call_id: str


Messages = Sequence[Mapping[str, object]]
"""A chat: `Message`s, or other mappings of JSON values."""


class GenerateOptions(TypedDict, total=False):
    """Everything optional of a generate call; see inference.proto for ranges. Unset means the server's default.

    `logprobs` is the number of alternatives per token (0: the chosen token's own); `tools` go to the chat template, as
    JSON schemas of functions.
    """

    request_id: str
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    max_tokens: int
    min_tokens: int
    stop: str | list[str]
    stop_token_ids: list[int]
    include_stop: bool
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    return_token_ids: bool
    echo: bool
    priority: int
    cache_salt: str
    tools: Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class Usage:
    """Token counts of one choice; `cached` prompt tokens came from the prefix cache."""

    prompt: int
    completion: int
    cached: int


@dataclass(frozen=True)
class Alternative:
    """One candidate at a position."""

    token_id: int
    logprob: float
    text: bytes


@dataclass(frozen=True)
class TokenLogprob:
    """The chosen token's log-probability; None for the first prompt token, which nothing predicts."""

    token_id: int
    logprob: float | None
    text: bytes
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """What the server made of the prompt. `adapter_digest` is None for the base."""

    request_id: str
    adapter_digest: str | None
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    seed: int


@dataclass(frozen=True)
class Finish:
    """Why a choice ended; at most one of the stop details is set."""

    reason: FinishReason
    usage: Usage
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True)
class Choice:
    """One finished continuation."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: Finish


@dataclass(frozen=True)
class Generation:
    """The answer of `generate`: at least one choice."""

    prompt: Prompt
    choices: tuple[Choice, ...]

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text


@dataclass(frozen=True)
class StreamPart:
    """One message of `stream`: new text of choice `index`; `prompt` on the first, `finish` on each choice's last."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt: Prompt | None = None
    usage: Usage | None = None
    finish: Finish | None = None


@dataclass(frozen=True)
class ServerLimits:
    """What the server accepts and holds."""

    context_tokens: int
    max_batch_tokens: int
    max_running_requests: int
    max_queued_requests: int
    kv_cache_tokens: int
    max_rank: int
    max_adapter_bytes: int
    adapter_device_bytes: int
    vocabulary: int
    max_choices: int
    max_logprobs: int
    max_stop_strings: int
    original_context_tokens: int


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of the base's weights in 4 bits and not; `experts` of the latter belong to fused experts."""

    nf4: int
    unquantized: int
    experts: int


@dataclass(frozen=True)
class ModelInfo:
    """The base that a server holds."""

    model_id: str
    architecture: str
    fingerprint: str
    chat_template_digest: str | None
    compute_dtype: str
    device: str
    deterministic: bool
    limits: ServerLimits
    weights: WeightCounts


@dataclass(frozen=True)
class CertificateReplay:
    """What the server computed of an adapter's certificate, beside what its training computed.

    `difference`: of a log-probability at most, over the deviation of its position's logits; `divergence`:
    Kullback-Leibler of a position at most, in nats.
    """

    difference: float
    divergence: float
    tolerance: float
    compute_dtype: str


@dataclass(frozen=True)
class Residency:
    """Where an adapter was at the moment of the call; `slot` only when resident."""

    tier: Tier
    slot: int | None
    leases: int
    merged: MergedState
    merged_reason: str
    host_bytes: int = 0  # of the server's memory, also of one on the device
    merged_certificate: CertificateReplay | None = None  # through the merged weights; None: not replayed


@dataclass(frozen=True)
class Adapter:
    """One name and the version (`digest`) it points at. `pinned` and `merge` are desired state of the name."""

    name: str
    digest: str
    kind: str
    base_fingerprint: str | None  # None: the files declare none
    base_mismatch: bool
    max_rank: int
    targets: tuple[str, ...]
    size_bytes: int
    labels: Mapping[str, str]
    aliases: tuple[str, ...]
    pinned: bool
    created: datetime
    updated: datetime
    health: AdapterHealth
    residency: Residency
    merge: bool
    accepted_bases: tuple[str, ...]  # fingerprints; empty: not known
    expires: datetime | None = None  # when the name is removed; None: never by itself
    max_uses: int | None = None  # requests; with the last one the name is removed
    uses_left: int | None = None
    vocabulary: int | None = None  # token ids it knows; None: those of the base
    text_files: tuple[str, ...] = ()  # of its own tokenizer and chat template; empty: the base's
    certificate: CertificateReplay | None = None  # as replayed when it was uploaded; None: it has none
    versions: tuple[str, ...] = ()  # that name@digest reaches, the newest first


@dataclass(frozen=True)
class FileProgress:
    """How much of one file of an upload the server holds durably."""

    file: str
    received: int
    size: int


@dataclass(frozen=True)
class FileEntry:
    """A file as a manifest names it."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Pushed:
    """The outcome of `push`. `created` is False when the name already pointed at this content.

    It may so by this very push: of a try whose answer was lost, only the repeat is heard.
    """

    adapter: Adapter
    created: bool
    sent_bytes: int
    resumed_bytes: int  # held by the server from an earlier, cut attempt
    left_out: tuple[str, ...]  # files of the directory that no adapter upload carries
    remark: str = ""  # what was seen of the adapter here that its owner should know, such as that it changes nothing


@dataclass(frozen=True)
class Pulled:
    """The outcome of `pull` and `verify`; every file's sha256 was checked. `directory` is None for `verify`."""

    digest: str
    directory: Path | None
    files: tuple[FileEntry, ...]


@dataclass(frozen=True)
class TransferProgress:
    """Bytes of a push or pull that are done, out of `total`."""

    file: str
    done: int
    total: int


ProgressCallback = Callable[[TransferProgress], None]


@dataclass(frozen=True)
class AdapterChanges:
    """What `update` shall change; only what is set."""

    pinned: bool | None = None
    merge: bool | None = None
    add_aliases: tuple[str, ...] = ()
    remove_aliases: tuple[str, ...] = ()
    set_labels: Mapping[str, str] = field(default_factory=dict)
    remove_labels: tuple[str, ...] = ()
    version: str = ""
    if_version: str = ""
