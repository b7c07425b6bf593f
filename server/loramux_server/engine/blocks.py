"""Which KV blocks are free, shared or cached: reference counts, prefix hashes and LRU, in integers.

Knows nothing of requests or tensors. A block is free (blank), cached (no reference, but a hash
under which it can be found again) or held. Only full blocks carry a hash.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def root_hash(tenant: str, salt: str, digest: str | None, *, long_rope: bool = False) -> bytes:
    """Where a chain of block hashes begins: two chains meet only for one tenant, salt, adapter content and choice of
    rotary factors.

    Always salted by the digest, also when an adapter leaves k and v alone. Fields are length-prefixed, so that
    no two lists read alike; a digest is never empty, so the base cannot be taken for an adapter.
    """
    fields = [field.encode() for field in (tenant, salt, digest or "", "long" if long_rope else "")]
    return hashlib.sha256(b"".join(len(field).to_bytes(8, "little") + field for field in fields)).digest()


def active_hash(root: bytes, active_from: int) -> bytes:
    """What joins a base's chain where an adapter begins to act, at position `active_from`; `root` is the adapter's own.

    The position is in it: of two prompts that begin alike one may activate the adapter later.
    """
    return hashlib.sha256(root + active_from.to_bytes(8, "little")).digest()


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a full block after `parent` (a block's hash or a root)."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class BlockPool:
    """`count` blocks by number, 0 .. count - 1. Used by the engine thread alone."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"a pool needs at least one block, not {count}")
        self.count = count
        self._references = [0] * count
        self._hashes: list[bytes | None] = [None] * count
        self._by_hash: dict[bytes, int] = {}
        self._owners: list[str | None] = [None] * count  # of blocks with a hash
        self._owned: dict[str, set[int]] = {}
        self._blank = list(range(count - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # no reference, hash kept; least recently used first

    @property
    def available(self) -> int:
        """Blocks that can be handed out now, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def held(self) -> int:
        """Blocks with at least one reference."""
        return self.count - self.available

    def find_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known beginning of the chain `hashes`; takes no reference."""
        found: list[int] = []
        for value in hashes:
            block = self._by_hash.get(value)
            if block is None:
                break
            found.append(block)
        return found

    def find_idle(self, blocks: Iterable[int]) -> list[int]:
        """Those of `blocks` without a reference: sharing them takes from what is available."""
        return [block for block in blocks if self._references[block] == 0]

    def share(self, blocks: Iterable[int]) -> None:
        """Take one more reference on each block that `find_prefix` gave."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks of undefined content with one reference each, or None and no change.

        Blank blocks go first, then the least recently used cached ones, which lose their hash.
        """
        if count > self.available:
            return None
        blocks: list[int] = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._drop_hash(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference on each. The tail of a chain becomes evictable before its head."""
        for block in reversed(blocks):
            left = self._references[block] - 1
            if left < 0:
                raise ValueError(f"block {block} released without a reference")
            self._references[block] = left
            if left == 0:
                if self._hashes[block] is None:
                    self._blank.append(block)
                else:
                    self._cached[block] = None

    def publish(self, block: int, value: bytes, owner: str | None = None) -> None:
        """Let the held, full `block` be found under `value`. The first of two equal blocks stays the known one.

        `owner` is for `forget`.
        """
        if self._references[block] == 0:
            raise ValueError(f"block {block} published without a reference")
        if self._hashes[block] is None and value not in self._by_hash:
            self._hashes[block] = value
            self._by_hash[value] = block
            if owner is not None:
                self._owners[block] = owner
                self._owned.setdefault(owner, set()).add(block)

    def forget(self, owner: str) -> None:
        """Nobody will look for the blocks of `owner` any more: those without a reference are blank from now on."""
        for block in sorted(self._owned.get(owner, ())):
            self._drop_hash(block)
            if self._references[block] == 0:
                del self._cached[block]
                self._blank.append(block)

    def invalidate(self, blocks: Iterable[int]) -> None:
        """Make held `blocks` impossible to find again: their content is in doubt."""
        for block in blocks:
            if self._references[block] == 0:
                raise ValueError(f"block {block} forgotten without a reference")
            self._drop_hash(block)

    def check(self) -> None:
        """Raise RuntimeError unless every block is in exactly one place and hashes and blocks agree."""
        blank, cached = set(self._blank), set(self._cached)
        held = {block for block, references in enumerate(self._references) if references > 0}
        if len(blank) != len(self._blank) or len(blank) + len(cached) + len(held) != self.count:
            raise RuntimeError("a KV block is counted twice or lost")
        if blank & cached or blank & held or cached & held:
            raise RuntimeError("a KV block is in two places")
        if any(self._hashes[block] is not None for block in blank):
            raise RuntimeError("a blank KV block carries a hash")
        if any(self._hashes[block] is None for block in cached):
            raise RuntimeError("a cached KV block carries no hash")
        known = {value: block for block, value in enumerate(self._hashes) if value is not None}
        if known != self._by_hash:
            raise RuntimeError("prefix hashes and KV blocks disagree")
        owned = {block: owner for owner, blocks in self._owned.items() for block in blocks}
        owners = {block: owner for block, owner in enumerate(self._owners) if owner is not None}
        if owned != owners or not owned.keys() <= set(known.values()) or not all(self._owned.values()):
            raise RuntimeError("KV blocks and their owners disagree")

    def _drop_hash(self, block: int) -> None:
        value = self._hashes[block]
        if value is not None:
            self._hashes[block] = None
            del self._by_hash[value]
            owner, self._owners[block] = self._owners[block], None
            if owner is not None:
                self._owned[owner].discard(block)
                if not self._owned[owner]:
                    del self._owned[owner]
