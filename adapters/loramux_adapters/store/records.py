"""What the store takes and gives, as frozen values: manifests, progress, records, quotas.

Torch-free. Knows no path and no database; whether a value is acceptable is asked of `checks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from loramux_adapters.spec import AdapterId, AdapterSpec

UNKNOWN_BASE = ""
"""The base of a version that was published before the store remembered bases."""


class Health(Enum):
    """Whether stored bytes still match their hash."""

    OK = "ok"
    CORRUPT = "corrupt"


@dataclass(frozen=True)
class FileEntry:
    """One file of an adapter: `size` in bytes, `sha256` as 64 hex digits."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class UploadManifest:
    """What a caller says, before the first byte, that an upload will be."""

    name: str
    files: tuple[FileEntry, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    allow_base_mismatch: bool = False
    ttl_seconds: float | None = None  # from the publish on; then the name is removed
    max_uses: int | None = None  # accepted requests; with the last one the name is removed
    if_version: str | None = None  # only if the name points at the digest that starts so; "": only a new name

    @property
    def ends(self) -> bool:
        """Whether the name is to be removed without anybody asking for it."""
        return self.ttl_seconds is not None or self.max_uses is not None


@dataclass(frozen=True)
class Lifetime:
    """When a name ends by itself: `expires` in seconds since the epoch, `max_uses` in requests; one of them is set."""

    expires: float | None
    max_uses: int | None
    uses_left: int | None  # None without max_uses


@dataclass(frozen=True)
class ReplayRecord:
    """What replaying a certificate came to, by a server that computes in `dtype`; see `certificate.replay.Replay`."""

    difference: float
    divergence: float
    tolerance: float
    dtype: str


@dataclass(frozen=True)
class FileProgress:
    """How far one file of an upload has come: the next chunk starts at `received`."""

    file: str
    received: int
    size: int


@dataclass(frozen=True)
class UploadProgress:
    """An open upload; files in the order of the manifest."""

    upload_id: str
    name: str
    files: tuple[FileProgress, ...]

    @property
    def complete(self) -> bool:
        """Whether every byte arrived; hashes are compared at the commit only."""
        return all(progress.received == progress.size for progress in self.files)


@dataclass(frozen=True)
class StagedFiles:
    """A complete upload whose hashes match, not yet visible: what a format reader validates."""

    manifest: UploadManifest
    files: Mapping[str, Path]


@dataclass(frozen=True)
class AdapterVersion:
    """What a reference meant at one moment: `id` is the name (never an alias) it was reached by.

    `use` is set where a use was taken: it is owed to `count_use` or `give_back_use`.
    """

    id: AdapterId
    digest: str
    spec: AdapterSpec
    use: int | None = None


@dataclass(frozen=True)
class AdapterRecord:
    """A name and the version it points at. `created` and `updated` are seconds since the epoch.

    `pinned` and `merge` are desired state that the name keeps when it is switched; the store only remembers them.
    `bases` are those that `AdapterStore.accepted_bases` tells of the version; `replays` of its certificate are by base.
    """

    id: AdapterId
    digest: str
    spec: AdapterSpec
    labels: Mapping[str, str]
    aliases: tuple[str, ...]  # sorted
    pinned: bool
    merge: bool
    bases: frozenset[str]
    created: float
    updated: float
    health: Health
    lifetime: Lifetime | None = None  # None: it stays until it is deleted
    replays: Mapping[str, ReplayRecord] = field(default_factory=dict)
    versions: tuple[str, ...] = ()  # digests that the name keeps, the newest first


@dataclass(frozen=True)
class AdapterPage:
    """Records by ascending name; `next_page_token` is empty on the last page."""

    records: tuple[AdapterRecord, ...]
    next_page_token: str


@dataclass(frozen=True)
class AdapterUpdate:
    """A change to a name; what is left out stays. Removals are applied before additions."""

    pinned: bool | None = None
    merge: bool | None = None
    add_aliases: tuple[str, ...] = ()
    remove_aliases: tuple[str, ...] = ()
    set_labels: Mapping[str, str] = field(default_factory=dict)
    remove_labels: tuple[str, ...] = ()
    version: str = ""  # the start of the digest to point at, of a version that the tenant's names keep
    if_version: str = ""  # only if the name points at the digest that starts so


@dataclass(frozen=True)
class DesiredState:
    """The desired state of the names of all tenants at one moment, as the digests they point at."""

    pinned: frozenset[str] = frozenset()
    merged: frozenset[str] = frozenset()


@dataclass(frozen=True)
class AdapterNames:
    """What points at one digest now: names of all tenants and their aliases, each sorted."""

    names: tuple[str, ...]
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """The outcome of a publish; `created` is False when the name already pointed at this digest."""

    record: AdapterRecord
    created: bool


@dataclass(frozen=True)
class Quotas:
    """Limits, each per tenant.

    `max_bytes` counts every distinct file that the tenant's names hold, superseded versions too; those
    give way, oldest first, before an upload is refused. Bytes that only running requests still hold
    are not counted.
    """

    max_adapters: int = 10_000
    max_bytes: int = 64 << 30
    max_upload_bytes: int = (1 << 30) + (2 << 20)
    max_open_uploads: int = 64
    upload_ttl_seconds: float = 86_400.0  # without a new byte
    keep_versions: int = 3  # per name, the current one included: what `name@digest` can reach
