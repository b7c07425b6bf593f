"""Several adapters that act together, as facts: which, by what weights, under what digest. Torch-free."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.spec import AdapterSpec

MOST_COMBINED: Final = 16
"""Adapters of one combination."""

LARGEST_WEIGHT: Final = 100.0

_DOMAIN = b"loramux-combination-v1"


@dataclass(frozen=True)
class Combination:
    """Digests of different adapters with their weights, in the order of the digests: no order is part of it."""

    terms: tuple[tuple[str, float], ...]

    @property
    def digest(self) -> str:
        """sha256 over the terms: the version of what they come to, as an adapter's digest is its version."""
        sha256 = hashlib.sha256(_DOMAIN)
        for digest, weight in self.terms:
            sha256.update(bytes.fromhex(digest) + struct.pack("<d", weight))
        return sha256.hexdigest()

    @property
    def digests(self) -> frozenset[str]:
        """Of the adapters."""
        return frozenset(digest for digest, _ in self.terms)


def combine_specs(terms: Sequence[tuple[AdapterSpec, float]]) -> tuple[Combination, AdapterSpec]:
    """What adapters with weights come to, as far as their facts tell.

    The ranks are those of all together; a module whose parts have no low-rank sum becomes a weight of its own when the
    adapters are read. Raises AdapterIncompatible where they cannot act together, ValueError for a weight that is 0, not
    finite or over LARGEST_WEIGHT.
    """
    for _, weight in terms:
        if not weight or not math.isfinite(weight) or abs(weight) > LARGEST_WEIGHT:
            raise ValueError(f"a weight must be a number up to {LARGEST_WEIGHT:g} and not 0, not {weight}")
    _check_virtual_tokens(terms)
    _check_invocations(terms)
    _check_vocabularies(terms)
    specs = [spec for spec, _ in terms]
    combination = Combination(tuple(sorted((spec.digest, float(weight)) for spec, weight in terms)))
    if len(combination.digests) < len(terms):
        raise AdapterIncompatible(
            "two of the adapters are one and the same content",
            subject=next(s.digest for i, s in enumerate(specs) if s.digest in {other.digest for other in specs[:i]}),
            remedy="name it once, with the sum of its weights",
        )
    ranks: dict[str, int] = {}
    for spec in specs:
        for module, rank in spec.ranks.items():
            ranks[module] = ranks.get(module, 0) + rank
    declared = {spec.base_fingerprint for spec in specs}
    return combination, AdapterSpec(
        digest=combination.digest,
        kind="combination",
        base_fingerprint=declared.pop() if len(declared) == 1 else None,
        base_mismatch=any(spec.base_mismatch for spec in specs),
        ranks=ranks,
        biases=frozenset().union(*(spec.biases for spec in specs)),
        nbytes=sum(spec.nbytes for spec in specs),
        others=frozenset().union(*(spec.others for spec in specs)),
        virtual_tokens=sum(spec.virtual_tokens for spec in specs),
        invocation=specs[0].invocation,
        vocabulary=max(spec.vocabulary for spec in specs),
        text_files=max(spec.text_files for spec in specs),
    )


def _check_virtual_tokens(terms: Sequence[tuple[AdapterSpec, float]]) -> None:
    having = [(spec, weight) for spec, weight in terms if spec.virtual_tokens]
    if len(having) > 1:
        raise AdapterIncompatible(
            f"{len(having)} of the adapters stand before the prompt (virtual tokens, a prefix): in which order would "
            "change what they say",
            subject=having[1][0].kind,
            remedy="name one such adapter; those that change weights may act beside it",
        )
    if having and having[0][1] != 1.0:
        raise AdapterIncompatible(
            f"positions before the prompt ({having[0][0].kind}) have no weight",
            subject=having[0][0].kind,
            remedy="give it the weight 1",
        )


def _check_invocations(terms: Sequence[tuple[AdapterSpec, float]]) -> None:
    if len({spec.invocation for spec, _ in terms}) > 1:
        raise AdapterIncompatible(
            "one of the adapters acts from its invocation tokens on only (activated LoRA), another from elsewhere",
            subject=next(spec.kind for spec, _ in terms if spec.invocation),
            remedy="name it alone, or with adapters of the same invocation tokens",
        )


def _check_vocabularies(terms: Sequence[tuple[AdapterSpec, float]]) -> None:
    resized = [(spec, weight) for spec, weight in terms if spec.vocabulary]
    if len(resized) > 1:
        raise AdapterIncompatible(
            f"{len(resized)} of the adapters have a vocabulary of their own: one id would be two tokens",
            subject=resized[1][0].digest,
            remedy="name one such adapter",
        )
    if resized and resized[0][1] != 1.0:
        raise AdapterIncompatible(
            "the base knows nothing of the tokens that the adapter adds, so that they have no weight",
            subject=resized[0][0].digest,
            remedy="give it the weight 1",
        )
    if len({spec.text_files for spec, _ in terms if spec.text_files}) > 1:
        raise AdapterIncompatible(
            "the adapters bring different tokenizers or chat templates: a text would be two prompts",
            subject=next(spec.digest for spec, _ in terms if spec.text_files),
            remedy="push all but one without them (--no-tokenizer)",
        )
