"""What any store of adapters promises. Every call may block on disk unless it says otherwise.

Any call may raise StoreUnavailable (disk full, read-only, locked, failing: retry later) or
StoreCorrupt; other errors are listed per method. All methods may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from loramux_adapters.spec import AdapterSpec
from loramux_adapters.store.records import (
    AdapterNames,
    AdapterPage,
    AdapterRecord,
    AdapterUpdate,
    AdapterVersion,
    DesiredState,
    FileEntry,
    Published,
    ReplayRecord,
    StagedFiles,
    UploadManifest,
    UploadProgress,
)


class AdapterStore(Protocol):
    """Durable adapters by content, and the names that point at them.

    A **version** is a digest and the files that were first uploaded for it. A **name** points at one
    version; the switch to another is atomic. The last `Quotas.keep_versions` versions of a name stay
    reachable by a prefix of their digest. An **alias** stands for a name and follows it; aliases and
    names share one namespace. A version's bytes are kept while a name reaches it or a hold is on it.
    A name whose last upload gave it an end is not found from that moment on, and removed by `expire` or with its last
    use; its next upload says anew whether it has one.
    """

    def begin_upload(self, tenant: str, upload_id: str, manifest: UploadManifest) -> UploadProgress:
        """Open an upload, or resume the one with this id if its name and files are the same.

        On a resume all but name and files is taken from this call.
        Raises AdapterInvalid (bad name, file, size, hash, label or end), AdapterConflict (the id is in use for
        something else, the name is an alias, or has no end and would get one), QuotaExceeded (too large, too many open
        uploads or adapters).
        """

    def write_chunk(self, tenant: str, upload_id: str, file: str, offset: int, data: bytes) -> int:
        """Append `data` at `offset`, which must be the size received so far; returns the new one.

        Written bytes survive the death of this process; `query_upload` makes them survive power loss.
        Raises UploadOffset (gap or overlap), AdapterInvalid (more than the declared size, or a file that the
        manifest does not have), AdapterNotFound (no such upload).
        """

    def query_upload(self, tenant: str, upload_id: str) -> UploadProgress:
        """How far an upload has come. Syncs first: every byte it reports is on the disk."""

    def staged_files(self, tenant: str, upload_id: str) -> StagedFiles:
        """The files of a complete upload, each compared with its declared hash.

        Raises AdapterInvalid naming the file that is short or wrong. A wrong file starts again at 0;
        the others keep what they have.
        """

    def publish(
        self, tenant: str, upload_id: str, spec: AdapterSpec, base: str, replay: ReplayRecord | None = None
    ) -> Published:
        """Make a staged upload visible under its name, in one step, durably; the upload ends.

        `base` is the fingerprint of the base that `spec` was validated against, `replay` what its certificate came to
        there. The same digest again is idempotent: the first bytes stay, unless they are corrupt, in which case the new
        ones replace them; a certificate comes to those that had none, and the base is added to those it is accepted
        for. Labels of the manifest, if any, replace those of the name; its desired state stays.
        Raises AdapterNotFound, QuotaExceeded, AdapterConflict (the name has become an alias, or `staged_files`
        was not called on this upload); after any error the upload is still there and nothing is visible.
        """

    def discard_upload(self, tenant: str, upload_id: str) -> None:
        """Forget an upload and its bytes; an unknown one is no error."""

    def acquire(self, tenant: str, name: str, prefix: str = "", *, counts: bool = False) -> AdapterVersion:
        """Look up a name or alias and hold what it points at, as one step against delete and replace.

        `counts`: where the name has a limit of uses, take one of those that are left, with what others have taken and
        not given back; AdapterNotFound if there is none.

        `prefix` selects a kept version by the start of its digest. The caller owes one `release(digest)`.
        Fast (tens of microseconds) and never waits for a writer. Raises AdapterNotFound, AdapterInvalid
        (ambiguous prefix), AdapterCorrupt (quarantined).
        """

    def count_use(self, use: int) -> bool:
        """Make a use that `acquire` took durable. True: it was the last, and the name is gone.

        What nobody was told before this returns need not be counted: a process that dies earlier has given nothing
        away. After an error the use is given back.
        """

    def give_back_use(self, use: int) -> None:
        """The use was none: the request was refused. Fast."""

    def next_expiry(self) -> float | None:
        """When the next name ends, in seconds since the epoch; None if none does. Fast."""

    def expire(self) -> int:
        """Remove the names whose time is over; returns how many. Bytes that a request holds stay until its release."""

    def hold(self, digest: str) -> None:
        """Hold a version's bytes once more. Fast. AdapterNotFound unless a name reaches it or a hold is on it now."""

    def release(self, digest: str) -> bool:
        """Give one hold back. Never blocks on disk. True: call `collect`, bytes may be free."""

    def collect(self) -> int:
        """Remove versions that no name reaches and no hold is on; returns how many."""

    def take_removed(self) -> frozenset[str]:
        """Digests of which no version is left, removed since the last call by whatever method. Fast.

        What others keep of them may go: whoever asks for one again must upload it again.
        """

    def desired_state(self) -> DesiredState:
        """The desired state of the names of all tenants; versions that are only kept have none. Fast."""

    def names(self, digests: Collection[str]) -> Mapping[str, AdapterNames]:
        """What points at each of `digests` (some hundreds at most) now; those without a name are left out. Fast."""

    def usage(self) -> tuple[int, int]:
        """Names of all tenants, and bytes of the files that they keep, superseded versions too. Fast."""

    def existing(self, digests: Collection[str]) -> frozenset[str]:
        """Those of `digests` (some hundreds at most) of which any tenant has a version, named or held. Fast."""

    def get(self, tenant: str, name: str, prefix: str = "") -> AdapterRecord:
        """The record behind a name or alias, of a kept version with `prefix`. Errors as `acquire`, health aside."""

    def list(self, tenant: str, page_size: int = 100, page_token: str = "") -> AdapterPage:
        """Records by name, 1 to 1000 a page. AdapterInvalid on a bad size or token."""

    def update(self, tenant: str, name: str, change: AdapterUpdate) -> AdapterRecord:
        """Apply `change` to a name in one step. An added alias moves here from any other adapter.

        Raises AdapterNotFound (an alias is not a name here, no such version), AdapterInvalid (bad alias or label, too
        many; an ambiguous version), AdapterConflict (a name with the alias' spelling exists; the name does not point at
        `if_version`), AdapterCorrupt (the version).
        """

    def delete(self, tenant: str, name: str) -> None:
        """Remove a name, its aliases and history; bytes go with the last hold. AdapterNotFound."""

    def files(self, digest: str) -> Mapping[str, Path]:
        """Paths of a version's files after re-hashing all of them; hold the digest while you read.

        Raises AdapterNotFound, AdapterCorrupt (from then on refused by `acquire`, until the same content
        is uploaded again).
        """

    def accepted_bases(self, digest: str) -> frozenset[str]:
        """The bases for which any tenant published this content, UNKNOWN_BASE among them; empty if none did.

        None is ever taken away: an operator may go back to an earlier base.
        """

    def consents_to_base(self, digest: str) -> bool:
        """Whether an uploader of this version agreed to serve it on a base other than the one it declares."""

    def entries(self, tenant: str, digest: str) -> tuple[FileEntry, ...]:
        """The files of a tenant's version by name, as first uploaded. AdapterNotFound."""

    def certificate(self, digest: str) -> bytes | None:
        """A version's certificate, of whatever tenant; None where there is none. AdapterCorrupt, see `check_file`."""

    def open_file(self, entry: FileEntry) -> BinaryIO:
        """Open a file's bytes for reading; they stay readable once opened. AdapterCorrupt if they are gone, as
        `check_file`.
        """

    def check_file(self, entry: FileEntry) -> None:
        """Re-hash a file's bytes. AdapterCorrupt, from then on raised by `acquire` too."""

    def close(self) -> None:
        """Let go of files and locks; the store is unusable afterwards. Idempotent."""
