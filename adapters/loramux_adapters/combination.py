"""Several adapters that act together, as facts: which, by what weights, under what digest. Torch-free."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.spec import AdapterSpec

MOST_COMBINED: Final = 16
"""Adapters of one combination."""

SMALLEST_WEIGHT: Final = 1e-6
LARGEST_WEIGHT: Final = 100.0
"""Of either sign. One smaller than the smallest might round to nothing, and the base would answer in the name."""

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


@dataclass(frozen=True)
class Term:
    """One adapter's facts with its weight, and what to call it in a refusal."""

    spec: AdapterSpec
    weight: float
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.spec.digest[:12]


def is_weight(value: float) -> bool:
    """Whether an adapter's effect can be multiplied by it."""
    return SMALLEST_WEIGHT <= abs(value) <= LARGEST_WEIGHT


def combine_specs(terms: Sequence[Term]) -> tuple[Combination, AdapterSpec]:
    """What adapters with weights come to, as far as their facts tell.

    The ranks are those of all together; a module whose parts have no low-rank sum becomes a weight of its own when the
    adapters are read. Raises AdapterIncompatible where they cannot act together, naming one, ValueError for a weight
    that is none.
    """
    for term in terms:
        if not is_weight(term.weight):
            raise ValueError(f"a weight must be from {SMALLEST_WEIGHT:g} to {LARGEST_WEIGHT:g}, not {term.weight}")
    _check_distinct(terms)
    _check_virtual_tokens(terms)
    _check_invocations(terms)
    _check_vocabularies(terms)
    specs = [term.spec for term in terms]
    combination = Combination(tuple(sorted((term.spec.digest, float(term.weight)) for term in terms)))
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


def _check_distinct(terms: Sequence[Term]) -> None:
    known: dict[str, Term] = {}
    for term in terms:
        other = known.setdefault(term.spec.digest, term)
        if other is not term:
            raise _refused(
                term, f"{other} and {term} are one and the same content", "name it once, with the sum of the weights"
            )


def _check_virtual_tokens(terms: Sequence[Term]) -> None:
    having = [term for term in terms if term.spec.virtual_tokens]
    if len(having) > 1:
        raise _refused(
            having[1],
            f"{_listed(having)} stand before the prompt (virtual tokens, a prefix), and in which order would change "
            "what they say",
            "name one such adapter; those that change weights may act beside it",
        )
    if having and having[0].weight != 1.0:
        what = f"{having[0]} ({having[0].spec.kind}) stands before the prompt, and positions have no weight"
        raise _refused(having[0], what, "give it the weight 1")


def _check_invocations(terms: Sequence[Term]) -> None:
    if len({term.spec.invocation for term in terms}) > 1:
        activated = next(term for term in terms if term.spec.invocation)
        raise _refused(
            activated,
            f"{activated} acts from its invocation tokens on only (activated LoRA), the others do not",
            "name it alone, or with adapters of the same invocation tokens",
        )


def _check_vocabularies(terms: Sequence[Term]) -> None:
    resized = [term for term in terms if term.spec.vocabulary]
    if len(resized) > 1:
        what = f"{_listed(resized)} have vocabularies of their own: one id would be two tokens"
        raise _refused(resized[1], what, "name one such adapter")
    if resized and resized[0].weight != 1.0:
        what = f"the base knows nothing of the tokens that {resized[0]} adds, so that they have no weight"
        raise _refused(resized[0], what, "give it the weight 1")
    texts = [term for term in terms if term.spec.text_files]
    if resized and texts and not resized[0].spec.text_files:
        what = f"the tokens of {resized[0]} would be read by the tokenizer of {texts[0]}: one id would be two tokens"
        raise _refused(resized[0], what, f"push {texts[0]} without its tokenizer (--no-tokenizer)")
    if len({term.spec.text_files for term in texts}) > 1:
        raise _refused(
            texts[1],
            f"{_listed(texts)} bring different tokenizers or chat templates: a text would be two prompts",
            "push all but one without them (--no-tokenizer)",
        )


def _listed(terms: Sequence[Term]) -> str:
    return " and ".join(map(str, terms))


def _refused(term: Term, what: str, remedy: str) -> AdapterIncompatible:
    return AdapterIncompatible(what, subject=str(term), remedy=remedy)
