"""Which names, manifests, labels and page tokens the store takes; each refusal names its subject.

Pure functions over strings and numbers. Knows no disk, no catalog and no quota that depends on them.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping

from loramux_adapters.adapter_files import MAX_FILE_BYTES, remedy_for
from loramux_adapters.errors import AdapterInvalid, QuotaExceeded
from loramux_adapters.names import (
    DIGEST,
    MAX_LABELS,
    MAX_TTL_SECONDS,
    MAX_USES,
    NAME,
    UPLOAD_ID,
    VERSION,
    TextRule,
    wrong_labels,
)
from loramux_adapters.store.records import FileEntry, Quotas, UploadManifest

MAX_PAGE_SIZE = 1000


def check_name(name: str, what: str = "name") -> None:
    """AdapterInvalid unless `name` is a NAME. Also for tenants and aliases."""
    _check(NAME, name, what)


def check_upload_id(upload_id: str) -> None:
    """AdapterInvalid unless `upload_id` is an UPLOAD_ID, which is safe as a directory's name."""
    _check(UPLOAD_ID, upload_id, "upload_id")


def check_prefix(prefix: str) -> None:
    """AdapterInvalid unless `prefix` is empty or 8 to 64 lower-case hex digits."""
    if prefix:
        _check(VERSION, prefix, "version")


def check_digest(digest: str) -> None:
    """AdapterInvalid unless `digest` is 64 lower-case hex digits."""
    _check(DIGEST, digest, "digest")


def check_fingerprint(base: str) -> None:
    """AdapterInvalid unless `base` is 64 lower-case hex digits."""
    _check(DIGEST, base, "base")


def check_labels(labels: Mapping[str, str]) -> None:
    """AdapterInvalid unless there are at most MAX_LABELS, with plain keys and printable values."""
    if len(labels) > MAX_LABELS:
        raise AdapterInvalid(f"{len(labels)} labels are more than {MAX_LABELS}", subject="labels")
    for key, why in wrong_labels(labels):
        raise AdapterInvalid(f"label {_shown(key)} is not allowed: {why}", subject="labels")


def check_upload(tenant: str, upload_id: str) -> None:
    """What every call on an open upload is given."""
    check_name(tenant, "tenant")
    check_upload_id(upload_id)


def check_reference(tenant: str, name: str, prefix: str) -> None:
    """What every look-up of a name is given."""
    check_name(tenant, "tenant")
    check_name(name)
    check_prefix(prefix)


def check_manifest(manifest: UploadManifest, quotas: Quotas) -> None:
    """AdapterInvalid on a bad name, label or file; QuotaExceeded when the upload alone is too large."""
    check_name(manifest.name)
    check_labels(manifest.labels)
    _check_lifetime(manifest.ttl_seconds, manifest.max_uses)
    check_prefix(manifest.if_version or "")
    if not manifest.files:
        raise AdapterInvalid("the manifest names no file", subject="manifest")
    seen: set[str] = set()
    for entry in manifest.files:
        if entry.file in seen:
            raise AdapterInvalid(f"{entry.file} is in the manifest twice", subject=entry.file)
        seen.add(entry.file)
        _check_entry(entry)
    total = sum(entry.size for entry in manifest.files)
    if total > quotas.max_upload_bytes:
        raise QuotaExceeded(
            f"an upload of {total} bytes is more than the {quotas.max_upload_bytes} allowed", subject="upload"
        )


def _check_lifetime(ttl: float | None, max_uses: int | None) -> None:
    if ttl is not None and not (math.isfinite(ttl) and 0 < ttl <= MAX_TTL_SECONDS):
        raise AdapterInvalid(
            f"ttl_seconds {ttl:g} must be over 0 and at most {MAX_TTL_SECONDS}",
            subject="ttl_seconds",
            remedy="leave it out for an adapter that stays",
        )
    if max_uses is not None and not 1 <= max_uses <= MAX_USES:
        raise AdapterInvalid(
            f"max_uses {max_uses} must be 1 to {MAX_USES}",
            subject="max_uses",
            remedy="leave it out for an adapter without a limit",
        )


def _check_entry(entry: FileEntry) -> None:
    if entry.file not in MAX_FILE_BYTES:
        raise AdapterInvalid(
            f"file {_shown(entry.file)} does not belong to an adapter",
            subject="manifest",
            remedy=remedy_for(entry.file),
        )
    limit = MAX_FILE_BYTES[entry.file]
    if entry.size < 1 or (limit is not None and entry.size > limit):
        raise AdapterInvalid(
            f"{entry.file} has {entry.size} bytes",
            subject=entry.file,
            remedy="it must have at least 1" + (f" and at most {limit}" if limit is not None else ""),
        )
    if not DIGEST.allows(entry.sha256):
        raise AdapterInvalid(f"the sha256 of {entry.file} is not {DIGEST.words}", subject=entry.file)


def encode_page_token(last_name: str) -> str:
    """An opaque token for the page after `last_name`."""
    return base64.urlsafe_b64encode(last_name.encode()).decode().rstrip("=")


def decode_page_token(token: str) -> str:
    """The name after which a page starts, empty for the first. AdapterInvalid unless we made the token."""
    if not token:
        return ""
    try:
        name = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        name = ""
    if not NAME.allows(name):
        raise AdapterInvalid("the page token is not one of this service", subject="page_token")
    return name


def check_page_size(page_size: int) -> None:
    """AdapterInvalid unless 1 <= page_size <= MAX_PAGE_SIZE."""
    if not 1 <= page_size <= MAX_PAGE_SIZE:
        raise AdapterInvalid(f"page_size {page_size} is not between 1 and {MAX_PAGE_SIZE}", subject="page_size")


def _check(rule: TextRule, text: str, what: str) -> None:
    if not rule.allows(text):
        raise AdapterInvalid(f"{what} {_shown(text)} is not allowed", subject=what, remedy=f"use {rule.words}")


def _shown(text: str) -> str:
    """`text` for a message: escaped to ASCII, so that no mark can reorder a terminal's line, and short."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")
