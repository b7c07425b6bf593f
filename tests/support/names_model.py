"""What the names of a store should be after each operation, in two dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loramux_adapters.store.local import LocalStore
from support.crash_server import Operation, StoredAdapter
from support.stores import TENANT, stored


@dataclass(frozen=True)
class Named:
    """What a name points at: an adapter of a corpus, and its end."""

    adapter: str
    uses_left: int | None = None
    expires: float | None = field(default=None, compare=False)  # by a clock that goes on; `ends` is what is compared
    ends: bool = False


@dataclass(frozen=True)
class NamesModel:
    """Names and aliases (alias -> name) at one moment."""

    names: Mapping[str, Named] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def after(self, operation: Operation, now: float) -> NamesModel:
        """Once an operation is done that began at `now`."""
        name = operation.name
        if operation.what == "publish":
            expires = None if operation.ttl is None else now + operation.ttl
            named = Named(operation.adapter, operation.max_uses, expires, ends=expires is not None)
            return replace(self, names={**self.names, name: named})
        if operation.what == "alias":
            return replace(self, aliases={**self.aliases, operation.alias: name})
        if operation.what == "delete":
            return self._without({name})
        if operation.what == "use":
            left = (self.names[name].uses_left or 0) - 1
            used = replace(self, names={**self.names, name: replace(self.names[name], uses_left=left)})
            return used if left else self._without({name})
        return self.at(now + operation.seconds)

    def at(self, now: float) -> NamesModel:
        """Without what has ended."""
        return self._without({name for name, each in self.names.items() if (each.expires or now + 1) <= now})

    def _without(self, gone: set[str]) -> NamesModel:
        return NamesModel(
            {name: each for name, each in self.names.items() if name not in gone},
            {alias: name for alias, name in self.aliases.items() if name not in gone},
        )


def look(store: LocalStore, corpus: Mapping[str, StoredAdapter], now: float) -> NamesModel:
    """What a store has, each adapter compared with its corpus byte for byte."""
    by_digest = {adapter.spec.digest: name for name, adapter in corpus.items()}
    names: dict[str, Named] = {}
    aliases: dict[str, str] = {}
    for record in store.list(TENANT).records:
        adapter = by_digest[record.digest]
        assert record.spec == corpus[adapter].spec
        assert stored(store, record.digest) == corpus[adapter].files
        lifetime = record.lifetime
        expires = lifetime.expires if lifetime else None
        assert expires is None or now < expires
        names[record.id.name] = Named(
            adapter, lifetime.uses_left if lifetime else None, expires, ends=expires is not None
        )
        aliases |= dict.fromkeys(record.aliases, record.id.name)
    return NamesModel(names, aliases)
