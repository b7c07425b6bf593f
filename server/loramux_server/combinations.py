"""What the digest of combined adapters stands for, as long as anything of it may be in memory. Torch-free."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from loramux_adapters.combination import Combination
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.store.records import AdapterNames

MOST_REMEMBERED: Final = 1024
"""Combinations that no request holds but of which something may be in memory; the least recently used are forgotten."""


@dataclass
class _Known:
    combination: Combination
    name: str  # as it was last asked for
    holders: int = 0


class Combinations:
    """Digest -> combination. Thread-safe, never waits."""

    def __init__(
        self, most_remembered: int = MOST_REMEMBERED, *, most_rank: int | None = None, most_bytes: int | None = None
    ) -> None:
        """`most_rank` rank rows and `most_bytes`, as uploaded, may one combination have in all; None: any."""
        self._most = most_remembered
        self._most_rank, self._most_bytes = most_rank, most_bytes
        self._known: dict[str, _Known] = {}
        self._unheld: OrderedDict[str, None] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def find(self, digest: str) -> Combination | None:
        """What is known under the digest."""
        known = self._known.get(digest)
        return None if known is None else known.combination

    def hold(self, combination: Combination, name: str, spec: AdapterSpec) -> None:
        """A request uses it from now on, until `release`.

        Raises AdapterIncompatible where it is too large: before any of it is read, and while nobody has used it.
        """
        for what, found, most in (
            ("ranks", spec.max_rank, self._most_rank),
            ("bytes", spec.nbytes, self._most_bytes),
        ):
            if most is not None and found > most:
                raise AdapterIncompatible(
                    f"the {what} of {name} add up to {found}, and one request may use {most}",
                    subject=name,
                    remedy="name fewer or smaller adapters",
                )
        digest = combination.digest
        with self._lock:
            known = self._known.setdefault(digest, _Known(combination, name))
            known.name = name
            known.holders += 1
            self._unheld.pop(digest, None)

    def release(self, digest: str) -> list[str]:
        """A request has ended. Gives the digests that are forgotten for it: what is kept of them is to be freed."""
        with self._lock:
            known = self._known[digest]
            known.holders -= 1
            if not known.holders:
                self._unheld[digest] = None
            gone = []
            while len(self._unheld) > self._most:
                gone.append(self._unheld.popitem(last=False)[0])
                del self._known[gone[-1]]
            return gone

    def forget(self, adapter: str) -> list[str]:
        """The adapter with this digest is gone: gives the digests of the combinations it was in, forgotten now.

        None of them is held, as whoever holds one holds its adapters.
        """
        with self._lock:
            gone = [digest for digest in self._unheld if adapter in self._known[digest].combination.digests]
            for digest in gone:
                del self._known[digest], self._unheld[digest]
            return gone

    def names(self, digests: Collection[str]) -> Mapping[str, AdapterNames]:
        """Of those of `digests` that are known, how they were asked for."""
        with self._lock:
            return {
                digest: AdapterNames((self._known[digest].name,), ()) for digest in digests if digest in self._known
            }
