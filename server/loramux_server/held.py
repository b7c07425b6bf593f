"""What a request holds of adapters from its acceptance to its end: one, or several that act as one. Torch-free."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Protocol

from loramux_adapters.combination import Combination
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.store.records import AdapterVersion


class Held(Protocol):
    """The common face of both. A context manager, which releases."""

    @property
    def digest(self) -> str:
        """The version, 64 hex digits."""

    @property
    def name(self) -> str:
        """For people: in logs and metrics."""

    @property
    def spec(self) -> AdapterSpec:
        """Its facts."""

    @property
    def judged_at_load(self) -> bool:
        """Whether loading it may find that it cannot be served, so that its uses are confirmed when it did not."""

    @property
    def text_source(self) -> Resolved:
        """The adapter that the text files of the facts are of, if there are any."""

    async def confirm(self) -> None:
        """The request is accepted: returns once its uses are durable, where they are limited. Idempotent."""

    def release(self) -> None:
        """Release the bytes and uses that were not confirmed. Idempotent, from any thread."""

    def __enter__(self) -> Held: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Resolved:
    """What a reference meant when it was resolved; holds the version's bytes until `release`.

    `name` is the adapter's name even if an alias was given. A context manager.
    """

    judged_at_load = False  # it was when it was uploaded

    def __init__(
        self,
        tenant: str,
        version: AdapterVersion,
        count_use: Callable[[int], Awaitable[None]],
        release: Callable[[str, int | None], None],
    ) -> None:
        self.tenant = tenant
        self.name = version.id.name
        self.spec = version.spec
        self._use = version.use
        self._count_use = count_use
        self._release = release
        self._lock = threading.Lock()
        self._held = True

    @property
    def digest(self) -> str:
        """The version, 64 hex digits."""
        return self.spec.digest

    @property
    def text_source(self) -> Resolved:
        """See Held."""
        return self

    async def confirm(self) -> None:
        """The request is accepted: returns once its use is durable, where uses of the name are limited. Idempotent.

        Nothing may be told to the caller before. StoreUnavailable: it was not counted, and the request must not go on.
        """
        use, self._use = self._use, None
        if use is not None:
            await self._count_use(use)

    def release(self) -> None:
        """Release the bytes and a use that was not confirmed. Idempotent, from any thread, never waits for the disk."""
        with self._lock:
            held, self._held = self._held, False
        if held:
            use, self._use = self._use, None
            self._release(self.digest, use)

    def __enter__(self) -> Resolved:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class HeldCombination:
    """Several held adapters as one. A context manager."""

    judged_at_load = True  # whether they have an exact sum

    def __init__(
        self,
        combination: Combination,
        name: str,
        spec: AdapterSpec,
        held: Sequence[Resolved],
        end: Callable[[str], None],
    ) -> None:
        self.digest = combination.digest
        self.name = name
        self.spec = spec
        self._held = held
        self._end = end
        self._lock = threading.Lock()
        self._is_held = True

    @property
    def text_source(self) -> Resolved:
        """See Held: the first that has any."""
        return next((each for each in self._held if each.spec.text_files), self._held[0])

    async def confirm(self) -> None:
        """See Held. Where one of several fails the others' uses are taken: none is ever given twice."""
        for each in self._held:
            await each.confirm()

    def release(self) -> None:
        """See Held."""
        with self._lock:
            held, self._is_held = self._is_held, False
        if held:
            self._end(self.digest)  # while its adapters are held still
            for each in self._held:
                each.release()

    def __enter__(self) -> HeldCombination:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def name_of(terms: Sequence[tuple[str, float]]) -> str:
    """How a combination is written: `style=0.7+facts`."""
    return "+".join(name if weight == 1.0 else f"{name}={weight:g}" for name, weight in terms)
