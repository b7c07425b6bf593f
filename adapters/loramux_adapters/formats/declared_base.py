"""The base an adapter says it was trained on, and what follows when that is another one.

Plain PEFT directories declare none. Torch-free. Declared in the safetensors metadata or in loramux.json.
"""

from __future__ import annotations

from collections.abc import Mapping

from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.refusals import quote
from loramux_adapters.spec import DIGEST_PATTERN, BaseModelSpec

LORAMUX_FILE = "loramux.json"
FINGERPRINT_KEY = "loramux_base_fingerprint"


def declared_fingerprint(
    metadata: Mapping[str, str], metadata_subject: str, loramux: Mapping[str, object]
) -> str | None:
    """The declared fingerprint, None when neither place holds one. Raises AdapterInvalid when it is malformed."""
    unknown = sorted(set(loramux) - {FINGERPRINT_KEY})
    if unknown:
        raise _invalid(f"{LORAMUX_FILE}: {quote(unknown[0])} is not a known key", LORAMUX_FILE)
    declared = {
        subject: value
        for subject, value in (
            (f"{metadata_subject}: __metadata__", metadata.get(FINGERPRINT_KEY)),
            (LORAMUX_FILE, loramux.get(FINGERPRINT_KEY)),
        )
        if value is not None
    }
    for subject, value in declared.items():
        if not isinstance(value, str) or not DIGEST_PATTERN.fullmatch(value):
            raise _invalid(f"{subject}: {FINGERPRINT_KEY} {quote(value)} is not 64 hex digits", subject)
    fingerprints = {str(value) for value in declared.values()}
    if len(fingerprints) > 1:
        raise _invalid(f"{LORAMUX_FILE} and {metadata_subject} declare different bases", LORAMUX_FILE)
    return next(iter(fingerprints), None)


def is_other_base(declared: str | None, base: BaseModelSpec, *, allow: bool) -> bool:
    """Whether the adapter declares another base. Raises AdapterIncompatible when it does and `allow` is false."""
    differs = declared is not None and declared != base.fingerprint
    if differs and not allow:
        raise AdapterIncompatible(
            f"the adapter was trained on base {declared}, this server holds {base.fingerprint} "
            f"({quote(base.model_id)})",
            subject=FINGERPRINT_KEY,
            remedy="upload it where its base is served, or allow the mismatch explicitly",
        )
    return differs


def _invalid(message: str, subject: str) -> AdapterInvalid:
    return AdapterInvalid(message, subject=subject, remedy="export the adapter again")
