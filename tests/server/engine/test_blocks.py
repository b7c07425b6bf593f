"""BlockPool: references, prefix hashes and LRU, against a model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loramux_server.engine.blocks import BlockPool, block_hash, root_hash


def test_allocate_gives_distinct_blocks_or_nothing():
    pool = BlockPool(3)
    first = pool.allocate(2)
    assert first is not None
    assert len(set(first)) == 2
    assert pool.allocate(2) is None
    assert pool.available == 1
    pool.check()


def test_a_published_block_is_found_after_release_and_shared():
    pool = BlockPool(4)
    (block,) = pool.allocate(1) or []
    value = block_hash(root_hash("t", "", None), [1, 2])
    pool.publish(block, value)
    pool.release([block])
    assert pool.available == 4
    assert pool.find_prefix([value, b"other"]) == [block]
    assert pool.find_idle([block]) == [block]
    pool.share([block])
    pool.share([block])
    assert pool.held == 1
    pool.release([block])
    assert pool.held == 1
    pool.check()


def test_eviction_takes_blank_blocks_first_then_least_recently_released():
    pool = BlockPool(3)
    blocks = pool.allocate(2) or []
    for block, value in zip(blocks, (b"a", b"b"), strict=True):
        pool.publish(block, value)
    pool.release([blocks[1]])
    pool.release([blocks[0]])
    assert pool.allocate(1) not in (None, [blocks[0]], [blocks[1]])
    assert pool.allocate(1) == [blocks[1]]
    assert pool.find_prefix([b"b"]) == []
    assert pool.find_prefix([b"a"]) == [blocks[0]]
    pool.check()


def test_the_tail_of_a_chain_is_evicted_before_its_head():
    pool = BlockPool(2)
    head, tail = pool.allocate(2) or []
    pool.publish(head, b"head")
    pool.publish(tail, b"tail")
    pool.release([head, tail])
    assert pool.allocate(1) == [tail]
    assert pool.find_prefix([b"head", b"tail"]) == [head]


def test_the_first_of_two_equal_blocks_stays_the_known_one():
    pool = BlockPool(2)
    first, second = pool.allocate(2) or []
    pool.publish(first, b"x")
    pool.publish(second, b"x")
    assert pool.find_prefix([b"x"]) == [first]
    pool.release([second])
    pool.release([first])
    pool.check()
    assert pool.find_prefix([b"x"]) == [first]


def test_forgotten_blocks_are_never_found():
    pool = BlockPool(1)
    blocks = pool.allocate(1) or []
    pool.publish(blocks[0], b"x")
    pool.invalidate(blocks)
    pool.release(blocks)
    assert pool.find_prefix([b"x"]) == []
    pool.check()


def test_misuse_is_an_error():
    pool = BlockPool(1)
    with pytest.raises(ValueError, match="without a reference"):
        pool.release([0])
    with pytest.raises(ValueError, match="without a reference"):
        pool.publish(0, b"x")
    with pytest.raises(ValueError, match="without a reference"):
        pool.invalidate([0])
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)


@pytest.mark.parametrize("damage", ["lost", "twice", "unhashed", "stray"])
def test_check_notices_damage(damage: str):
    pool = BlockPool(3)
    (block,) = pool.allocate(1) or []
    pool.publish(block, b"x")
    pool.release([block])
    pool.check()
    if damage == "lost":
        pool._blank.pop()
    elif damage == "twice":
        pool._blank.append(block)
    elif damage == "unhashed":
        pool._hashes[block] = None
    else:
        pool._by_hash[b"y"] = 1
    with pytest.raises(RuntimeError):
        pool.check()


def test_chains_meet_only_for_one_tenant_salt_and_adapter():
    roots = [
        root_hash(tenant, salt, digest)
        for tenant in ("a", "ab", "")
        for salt in ("", "b", "ab")
        for digest in (None, "d", "e")
    ]
    assert len(set(roots)) == len(roots)
    assert block_hash(roots[0], [1, 2]) == block_hash(roots[0], [1, 2])
    assert len({block_hash(root, [1, 2]) for root in roots}) == len(roots)
    assert block_hash(roots[0], [1, 2]) != block_hash(roots[0], [2, 1])


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share, publish and give back; a dictionary of counts is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.held: list[list[int]] = []
        self.published: dict[bytes, int] = {}  # as far as it may be found; eviction can only remove
        self.owners: dict[bytes, str | None] = {}
        self.serial = 0

    @rule(count=st.integers(0, 7))
    def allocate(self, count: int) -> None:
        available = self.pool.available
        blocks = self.pool.allocate(count)
        if blocks is None:
            assert count > available
            assert self.pool.available == available
            return
        assert len(blocks) == count
        assert not {block for holder in self.held for block in holder} & set(blocks)
        self.published = {value: block for value, block in self.published.items() if block not in blocks}
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.held))
        for block in holder:
            if block not in self.published.values():
                self.serial += 1
                value = self.serial.to_bytes(4, "little")
                owner = data.draw(st.sampled_from([None, "red", "blue"]))
                self.pool.publish(block, value, owner)
                self.published[value] = block
                self.owners[value] = owner

    @rule(owner=st.sampled_from(["red", "blue"]))
    def forget_owner(self, owner: str) -> None:
        self.pool.forget(owner)
        self.published = {value: block for value, block in self.published.items() if self.owners[value] != owner}

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        value = data.draw(st.sampled_from(sorted(self.published)))
        found = self.pool.find_prefix([value])
        assert found == [self.published[value]]
        self.pool.share(found)
        self.held.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.held))
        self.pool.invalidate(holder)
        self.published = {value: block for value, block in self.published.items() if block not in holder}

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        assert self.pool.held == len({block for holder in self.held for block in holder})
        for value, block in self.published.items():
            assert self.pool.find_prefix([value]) == [block]


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPoolMachine = PoolMachine.TestCase
