"""The base an adapter says it was trained on, and what follows when that is another one.

Plain PEFT directories declare none. Torch-free. Declared in the safetensors metadata or in loramux.json
(lorica.json, as the project was called before).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loramux_adapters import former_name
from loramux_adapters.adapter_files import DECLARATION_FILES
from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats import strict_json
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.refusals import quote
from loramux_adapters.names import DIGEST
from loramux_adapters.spec import BaseModelSpec

FINGERPRINT_KEY = "loramux_base_fingerprint"
_KEYS = (FINGERPRINT_KEY, former_name.FINGERPRINT_KEY)
RESIDUAL_KEY = "loramux_base_is_residual"


def read_declarations(files: Mapping[str, Path], limits: ReadLimits) -> dict[str, Mapping[str, object]]:
    """The contents of those of DECLARATION_FILES that are there. Raises AdapterInvalid, and OSError."""
    return {
        name: strict_json.read_object(files[name], name, limits.max_config_bytes)
        for name in DECLARATION_FILES
        if name in files
    }


def declared_fingerprint(
    metadata: Mapping[str, str], metadata_subject: str, declarations: Mapping[str, Mapping[str, object]]
) -> str | None:
    """The declared fingerprint, None when no place holds one: the weights' `metadata`, or the `declarations`
    that `read_declarations` found.

    Raises AdapterInvalid when one is malformed or two differ.
    """
    declared: dict[tuple[str, str], object] = {}
    for subject, content in ((f"{metadata_subject}: __metadata__", metadata), *declarations.items()):
        declared |= {(subject, key): content[key] for key in _KEYS if content.get(key) is not None}
    for subject, content in declarations.items():
        unknown = sorted(set(content) - {*_KEYS, RESIDUAL_KEY})
        if unknown:
            raise _invalid(f"{subject}: {quote(unknown[0])} is not a known key", subject)
    for (subject, key), value in declared.items():
        if not isinstance(value, str) or not DIGEST.allows(value):
            raise _invalid(f"{subject}: {key} {quote(value)} is not 64 hex digits", subject)
    if len(set(declared.values())) > 1:
        subjects = list(dict.fromkeys(subject for subject, _ in declared))
        raise _invalid(f"{' and '.join(subjects)} declare different bases", subjects[-1])
    return next((str(value) for value in declared.values()), None)


def declares_residual(declarations: Mapping[str, Mapping[str, object]]) -> bool:
    """Whether the declared base is what an initialization left of another one. Raises AdapterInvalid."""
    for subject, content in declarations.items():
        value = content.get(RESIDUAL_KEY, False)
        if not isinstance(value, bool):
            raise _invalid(f"{subject}: {RESIDUAL_KEY} {quote(value)} is neither true nor false", subject)
        if value:
            return True
    return False


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
