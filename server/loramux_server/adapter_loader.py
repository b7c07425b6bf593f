"""From the store into memory: whether a version may be loaded for the base served, and that it is what was asked for.

Knows no format: what reads the files is injected. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from loramux_adapters.combination import Combination
from loramux_adapters.errors import AdapterCorrupt, AdapterIncompatible
from loramux_adapters.residency.tiers import Weights
from loramux_adapters.store.protocol import AdapterStore
from loramux_adapters.store.records import UNKNOWN_BASE

W = TypeVar("W", bound=Weights)
W_co = TypeVar("W_co", bound=Weights, covariant=True)


class ReadWeights(Protocol[W_co]):
    """Read an adapter's files against the base served; raises AdapterInvalid or AdapterIncompatible."""

    def __call__(self, files: Mapping[str, Path], *, allow_base_mismatch: bool) -> W_co: ...


class AdapterLoader(Generic[W]):
    """Loads by digest for the base with the fingerprint `base`."""

    def __init__(self, store: AdapterStore, read: ReadWeights[W], base: str) -> None:
        self._store, self._read, self._base = store, read, base

    def load(self, digest: str) -> W:
        """The adapter's weights, every file hashed on the way.

        Raises AdapterIncompatible (accepted for other bases only: equal shapes make no equal base), AdapterNotFound,
        AdapterCorrupt, and what the reader raises.
        """
        bases = self._store.accepted_bases(digest)
        if bases and not bases & {self._base, UNKNOWN_BASE}:
            raise AdapterIncompatible(
                f"adapter {digest[:12]} was accepted for base {' and '.join(sorted(bases))}, "
                f"this server holds {self._base}",
                subject=digest,
                remedy="upload it again for this base",
            )
        # What was accepted for this very base was judged then, by what the uploader declared and allowed.
        consent = self._base in bases or self._store.consents_to_base(digest)
        weights = self._read(self._store.files(digest), allow_base_mismatch=consent)
        if weights.spec.digest != digest:
            raise AdapterCorrupt(
                f"the files stored as {digest[:12]} hold adapter {weights.spec.digest[:12]}",
                subject=digest,
                remedy="remove it and upload it again",
            )
        return weights


class LendingLoader(Generic[W]):
    """Gives what is lent before it asks `load`: adapters that are tried out before they are published."""

    def __init__(self, load: Callable[[str], W]) -> None:
        self._load = load
        self._lent: dict[str, W] = {}

    @contextmanager
    def lend(self, weights: W) -> Iterator[None]:
        """While it lasts, `weights` are what their digest loads; one adapter at a time."""
        self._lent[weights.spec.digest] = weights
        try:
            yield
        finally:
            del self._lent[weights.spec.digest]

    def load(self, digest: str) -> W:
        """Raises what loading raises."""
        lent = self._lent.get(digest)
        return self._load(digest) if lent is None else lent


class Combine(Protocol[W]):
    """Make one adapter of several with weights; raises AdapterIncompatible where it cannot be exact."""

    def __call__(self, terms: Sequence[tuple[W, float]]) -> W: ...


class CombinationLoader(Generic[W]):
    """Makes what `find` knows as combined of adapters, each of which `load` gives; `stored` gives whatever else."""

    def __init__(
        self,
        find: Callable[[str], Combination | None],
        load: Callable[[str], W],
        stored: Callable[[str], W],
        combine: Combine[W],
    ) -> None:
        self._find, self._load, self._stored, self._combine = find, load, stored, combine

    def load(self, digest: str) -> W:
        """Raises AdapterIncompatible where no exact sum is found, and what loading raises."""
        combination = self._find(digest)
        if combination is None:
            return self._stored(digest)
        return self._combine([(self._load(adapter), weight) for adapter, weight in combination.terms])
