"""Owners take turns on few threads: many or slow pieces of one hold up its own, and no other's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from loramux_server.api import turns as module
from loramux_server.api.turns import Turns
from loramux_server.errors import Overloaded


class Works:
    """Pieces of work that note their begin and take until they are let go."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.let_go: dict[str, threading.Event] = {}
        self._news, self._seen = threading.Semaphore(0), 0

    def piece(self, name: str) -> Callable[[], str]:
        self.let_go[name] = threading.Event()

        def work() -> str:
            self.begun.append(name)
            self._news.release()
            self.let_go[name].wait(60)
            return name

        return work

    def start(self, turns: Turns, owner: str, count: int = 1) -> list[asyncio.Task[str]]:
        return [asyncio.create_task(turns.run(owner, self.piece(f"{owner}{number}"))) for number in range(count)]

    async def until(self, count: int) -> None:
        """In all; called with rising numbers."""
        for _ in range(count - self._seen):
            assert await asyncio.to_thread(self._news.acquire, timeout=30)
        self._seen = count

    def let_all_go(self) -> None:
        for event in self.let_go.values():
            event.set()


def make_turns(most: int = 100, most_of_one: int = 50) -> Turns:
    return Turns(2, most, most_of_one, "test")


@pytest.mark.asyncio
async def test_the_owner_whose_last_turn_is_longest_ago_is_next() -> None:
    turns, works = make_turns(), Works()
    tasks = works.start(turns, "many", 40)
    await works.until(2)
    tasks += works.start(turns, "one") + works.start(turns, "other")
    works.let_go["many0"].set()
    await works.until(3)
    works.let_go["one0"].set()
    await works.until(4)
    assert works.begun[2:] == ["one0", "other0"]
    works.let_all_go()
    assert len(await asyncio.gather(*tasks)) == 42


@pytest.mark.asyncio
async def test_whoever_is_slow_leaves_a_thread_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLOW_SECONDS", 0.02)
    turns, works = make_turns(), Works()
    await turns.run("slow", lambda: threading.Event().wait(0.1))
    tasks = works.start(turns, "slow", 5)
    await works.until(1)
    assert await asyncio.wait_for(turns.run("quick", lambda: 7), 30) == 7
    assert works.begun == ["slow0"]
    works.let_all_go()
    assert len(await asyncio.gather(*tasks)) == 5


@pytest.mark.asyncio
async def test_beyond_the_bounds_an_owner_is_refused_and_then_all() -> None:
    turns, works = make_turns(most=5, most_of_one=3), Works()
    tasks = works.start(turns, "a", 3)
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await turns.run("a", lambda: 1)
    tasks += works.start(turns, "b", 2)
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await turns.run("c", lambda: 1)
    works.let_all_go()
    await asyncio.gather(*tasks)
    assert await turns.run("c", lambda: 1) == 1


@pytest.mark.asyncio
async def test_who_goes_away_keeps_neither_a_place_nor_a_thread_longer_than_its_work() -> None:
    turns, works = make_turns(most=6, most_of_one=6), Works()
    tasks = works.start(turns, "a", 6)
    await works.until(2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    late = works.start(turns, "b", 4)  # there is room for as many as were waiting
    await asyncio.sleep(0.05)
    assert works.begun == ["a0", "a1"]  # whose threads are at work still
    works.let_all_go()
    await works.until(4)
    works.let_all_go()
    assert sorted(await asyncio.gather(*late)) == ["b0", "b1", "b2", "b3"]
    assert await turns.run("a", lambda: 1) == 1


@pytest.mark.asyncio
async def test_a_failure_is_the_callers_and_frees_the_thread() -> None:
    turns = make_turns()
    for _ in range(5):
        with pytest.raises(ZeroDivisionError):
            await turns.run("a", lambda: 1 // 0)
    assert await turns.run("a", lambda: 1) == 1
