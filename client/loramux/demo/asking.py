"""The demo's questions to the server: held-out accuracy, examples, and the mixed burst.

Everything goes through the public client, as a user's own program would.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence

from loramux.aio import AsyncClient
from loramux.demo.values import Accuracy, Ask, BurstOutcome
from loramux.types import Message

ANSWER_TOKENS = 48
IN_FLIGHT = 64


async def answer(client: AsyncClient, prompt: str, adapter: str) -> str:
    """The greedy answer to one chat message, without surrounding blanks."""
    messages: list[Message] = [{"role": "user", "content": prompt}]
    said = await client.generate(messages=messages, adapter=adapter, temperature=0.0, max_tokens=ANSWER_TOKENS)
    return said.text.strip()


async def measure_accuracy(client: AsyncClient, asks: Sequence[Ask], on_answer: Callable[[], None]) -> Accuracy:
    """Ask every question of the base and of its adapter, mixed, many at once; `on_answer` is called for each answer."""
    places = asyncio.Semaphore(IN_FLIGHT)

    async def right(ask: Ask, adapter: str) -> bool:
        async with places:
            said = await answer(client, ask.prompt, adapter)
        on_answer()
        return said == ask.answer

    both = [right(ask, adapter) for ask in asks for adapter in ("", ask.adapter)]
    results = await asyncio.gather(*both)
    count = len(asks)
    return Accuracy(count, base=sum(results[0::2]) / count, adapter=sum(results[1::2]) / count)


async def measure_burst(client: AsyncClient, asks: Sequence[Ask], *, tokens: int, rounds: int) -> BurstOutcome:
    """Send all questions at once, each to its adapter, then the same prompts to the base; in turn, `rounds` times.

    Every request makes exactly `tokens` tokens, so that both sides do the same work. One round before warms up.
    """
    mixed, base = [], []
    for number in range(rounds + 1):
        rates = {}
        for kind in ("mixed", "base") if number % 2 else ("base", "mixed"):
            rates[kind] = await _burst(client, asks, tokens, with_adapters=kind == "mixed", salt=f"{number}/{kind}")
        if number > 0:
            mixed.append(rates["mixed"])
            base.append(rates["base"])
    return BurstOutcome(
        requests=len(asks),
        adapters=len({ask.adapter for ask in asks}),
        rounds=rounds,
        mixed_rate=statistics.median(mixed),
        base_rate=statistics.median(base),
    )


async def _burst(client: AsyncClient, asks: Sequence[Ask], tokens: int, *, with_adapters: bool, salt: str) -> float:
    async def one(ask: Ask) -> int:
        messages: list[Message] = [{"role": "user", "content": ask.prompt}]
        said = await client.generate(
            messages=messages,
            adapter=ask.adapter if with_adapters else "",
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            cache_salt=salt,  # no round may profit from the prefixes of another
        )
        return said.choices[0].finish.usage.completion

    started = time.perf_counter()
    made = sum(await asyncio.gather(*(one(ask) for ask in asks)))
    return made / (time.perf_counter() - started)
