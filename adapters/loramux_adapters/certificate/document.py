"""The certificate of a trained adapter: what its training computed on a few probes, for a server to compute again.

A JSON file in the adapter's directory, see docs/certificates.md. It is no proof of who trained: its seal finds what was
changed by accident, the replay whatever computes otherwise. Torch-free.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import FailFast, Strict

from loramux_adapters.adapter_files import CERTIFICATE_FILE
from loramux_adapters.errors import CertificateRefused
from loramux_adapters.formats import strict_json
from loramux_adapters.formats.refusals import quote
from loramux_adapters.validation import Section, ValuesInvalid, read

VERSION = 1
TOLERANCES: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.1}
"""Compute dtype of a server -> how far a log-probability may be from the certified one, over the deviation of the
logits. Measured: docs/certificates.md. Part of the version: a certificate that states others is refused."""

MAX_BYTES = 1 << 20
MAX_PROBES = 8
MAX_PROBE_TOKENS = 256
MAX_TOP = 16
MAX_KEYS = 64
_REMEDY = "train and export the adapter again, or remove the file to upload it without a certificate"


Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
# A stranger's file may have a hundred thousand mistakes: the first of each list is told.
Wholes = Annotated[tuple[Whole, ...], FailFast()]
Numbers = Annotated[tuple[Number, ...], FailFast()]


@dataclass(frozen=True)
class Probe(Section):
    """Token ids, and what the model predicts after each of them but the last.

    Of position i, `top_tokens[i]` are the most likely next tokens, `top_log_probs[i]` their natural log-probabilities
    and `deviations[i]` the standard deviation of all logits.
    """

    tokens: Wholes
    deviations: Numbers
    top_tokens: Annotated[tuple[Wholes, ...], FailFast()]
    top_log_probs: Annotated[tuple[Numbers, ...], FailFast()]


Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Arithmetic(Section):
    """How the training computed: `frozen_products` is the dtype of products with frozen weights."""

    device: str
    compute_dtype: Dtype
    frozen_products: Dtype


@dataclass(frozen=True)
class Certificate(Section):
    """`adapter` is its digest, `base` the fingerprint of its base, `chat_template` the sha256 of the base's template,
    empty where it has none; `versions` are of the packages that computed.
    """

    adapter: str
    base: str
    chat_template: str
    computed: Arithmetic
    versions: Mapping[str, str]
    probes: Annotated[tuple[Probe, ...], FailFast()]
    tolerance: Mapping[str, Number] = dataclasses.field(default_factory=lambda: dict(TOLERANCES))
    version: Whole = VERSION

    def tolerance_on(self, dtype: str) -> float:
        """On a server that computes in `dtype`: that of the coarsest arithmetic that takes part."""
        return max(self.tolerance[name] for name in (dtype, self.computed.compute_dtype, self.computed.frozen_products))

    def to_json(self) -> bytes:
        """The file's bytes, sealed."""
        values = dataclasses.asdict(self)
        return json.dumps({**values, "seal": _seal(values)}, indent=1).encode() + b"\n"


def parse(data: bytes) -> Certificate:
    """The certificate in a file's bytes. Raises CertificateRefused where it is none of this version, or was changed,
    and AdapterInvalid for what is no JSON.
    """
    values = strict_json.parse(data, CERTIFICATE_FILE)
    version = values.get("version")
    if version != VERSION:
        raise refused(f"has version {quote(version)}, this program knows {VERSION}")
    seal = values.pop("seal", None)
    if seal != _seal(values):
        raise refused("was changed after it was made: its seal does not fit what it says")
    _check_keys(values)
    try:
        certificate = read(Certificate, values)
    except ValuesInvalid as error:
        raise refused(f"is malformed: {error}") from error
    _check_shape(certificate.probes)
    if dict(certificate.tolerance) != dict(TOLERANCES):
        raise refused("states another tolerance than its version has")
    return certificate


def refused(what: str, *, remedy: str = _REMEDY) -> CertificateRefused:
    """`what` goes on from the file's name."""
    return CertificateRefused(f"{CERTIFICATE_FILE} {what}", subject=CERTIFICATE_FILE, remedy=remedy)


def _check_keys(values: Mapping[str, Any]) -> None:
    """Each key that is not known would be a finding."""
    inner = [*values.values(), *(probes if isinstance(probes := values.get("probes"), list) else ())]
    most = max((len(each) for each in (values, *inner) if isinstance(each, dict)), default=0)
    if most > MAX_KEYS:
        raise refused(f"is malformed: has {most} keys in one object, not at most {MAX_KEYS}")


def _check_shape(probes: Sequence[Probe]) -> None:
    if not 1 <= len(probes) <= MAX_PROBES:
        raise refused(f"has {len(probes)} probes, not 1 to {MAX_PROBES}")
    for number, probe in enumerate(probes):
        predicted = len(probe.tokens) - 1
        lists: tuple[Sequence[Any], ...] = (probe.deviations, probe.top_tokens, probe.top_log_probs)
        if not 1 <= predicted < MAX_PROBE_TOKENS or any(len(each) != predicted for each in lists):
            raise refused(f"is malformed: probe {number} has no prediction after each token but the last")
        for top, log_probs in zip(probe.top_tokens, probe.top_log_probs, strict=True):
            if not 1 <= len(top) <= MAX_TOP or len(top) != len(log_probs) or len(set(top)) != len(top):
                raise refused(f"is malformed: probe {number} has predictions that are no list of distinct tokens")
        if min(probe.tokens) < 0 or any(min(top) < 0 for top in probe.top_tokens):
            raise refused(f"is malformed: probe {number} has a negative token id")
        if any(value > 1e-3 for each in probe.top_log_probs for value in each):
            raise refused(f"is malformed: probe {number} has a log-probability above 0")
        if not all(0 < value < math.inf for value in probe.deviations):
            raise refused(f"is malformed: probe {number} has a deviation that is not above 0")


def _seal(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
