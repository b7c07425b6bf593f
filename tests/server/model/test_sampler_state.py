"""What the sampler remembers: penalties across chunks and preemption, prompt log-probabilities, retiring."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loramux_server.engine.plan import BASE_SLOT, Chunk
from loramux_server.model.sampler import Sampler
from loramux_server.model.sampling_state import TokenCounts
from loramux_server.requests import RequestFailure, SamplingParams, TokenLogprob

VOCABULARY = 40
PENALIZED = SamplingParams(
    temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.25, logprobs=VOCABULARY
)


def chunk(
    tokens: tuple[int, ...],
    start: int,
    prompt_length: int,
    history: tuple[int, ...] | None = None,
    params: SamplingParams = PENALIZED,
    request_id: str = "r#0",
) -> Chunk:
    return Chunk(request_id, tokens, start, (0,), BASE_SLOT, True, params, prompt_length, history)


def expected_logprobs(row: Tensor, tokens: tuple[int, ...], prompt_length: int) -> dict[int, float]:
    """The definitions, one token at a time: Hugging Face's repetition, OpenAI's frequency and presence."""
    scores = row.tolist()
    output = tokens[prompt_length:]
    for token in set(tokens):
        scores[token] = scores[token] * 1.3 if scores[token] < 0 else scores[token] / 1.3
    for token in set(output):
        scores[token] -= output.count(token) * 0.25 + 0.4
    return dict(enumerate(torch.tensor(scores).log_softmax(-1).tolist()))


def logprobs_of(sampler: Sampler, last: Chunk, row: Tensor) -> dict[int, float]:
    sampled, failures = sampler.sample([last], row[None])
    assert not failures
    logprob = sampled[last.request_id].logprob
    assert logprob is not None
    return dict(logprob.top)


@pytest.mark.parametrize("seed", range(8))
def test_penalties_follow_the_tokens_once_through_chunks_and_preemption(seed: int) -> None:
    rng = random.Random(seed)
    prompt_length = rng.randint(1, 12)
    tokens = tuple(rng.randrange(VOCABULARY) for _ in range(prompt_length + rng.randint(1, 12)))
    row = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
    expected = expected_logprobs(row, tokens, prompt_length)
    sampler = Sampler(VOCABULARY)
    for _ in range(3):  # three lives: admitted, then preempted in between
        start = rng.choice([0, rng.randrange(len(tokens))])
        fresh = True
        while start < len(tokens):
            end = rng.randint(start + 1, len(tokens))
            part = chunk(tokens[start:end], start, prompt_length, tokens[:start] if fresh else None)
            sampler.observe([part])
            if not fresh:
                sampler.observe([part])  # once more counts nothing
            fresh, start = False, end
        assert logprobs_of(sampler, part, row) == pytest.approx(expected, abs=1e-5)
        assert logprobs_of(sampler, part, row) == pytest.approx(expected, abs=1e-5)  # sampling counts nothing twice
    sampler.retire(["r#0"])
    assert sampler.remembered() == 0


def test_sampling_observes_what_was_not() -> None:
    row = torch.linspace(-1, 1, VOCABULARY)
    sampler = Sampler(VOCABULARY)
    first = logprobs_of(sampler, chunk((1, 2, 39), 0, 3), row)
    second = logprobs_of(sampler, chunk((39,), 3, 3), row)
    assert first == pytest.approx(expected_logprobs(row, (1, 2, 39), 3), abs=1e-5)
    assert second == pytest.approx(expected_logprobs(row, (1, 2, 39, 39), 3), abs=1e-5)


def test_an_id_that_begins_anew_forgets_its_former_life() -> None:
    row = torch.linspace(-1, 1, VOCABULARY)
    sampler = Sampler(VOCABULARY)
    sampler.observe([chunk((7, 7, 8, 9), 0, 1)])
    assert logprobs_of(sampler, chunk((1, 2), 0, 2), row) == pytest.approx(expected_logprobs(row, (1, 2), 2), abs=1e-5)
    again = chunk((5,), 2, 2, history=(3, 4))
    assert logprobs_of(sampler, again, row) == pytest.approx(expected_logprobs(row, (3, 4, 5), 2), abs=1e-5)


def test_missing_positions_are_an_error() -> None:
    sampler = Sampler(VOCABULARY)
    with pytest.raises(ValueError, match="never observed"):
        sampler.observe([chunk((1,), 5, 3)])
    sampler.observe([chunk((1, 2), 0, 3)])
    with pytest.raises(ValueError, match="never observed"):
        sampler.observe([chunk((1,), 3, 3)])
    with pytest.raises(ValueError, match="history"):
        sampler.observe([chunk((1,), 3, 3, history=(1,))])


def test_requests_do_not_share_rows_when_ids_come_and_go() -> None:
    row = torch.linspace(-1, 1, VOCABULARY)
    sampler = Sampler(VOCABULARY)
    for generation in range(3):
        chunks = [chunk((i, i + 1), 0, 1, request_id=f"{generation}-{i}#0") for i in range(20)]
        sampler.observe(chunks)
        sampled, _ = sampler.sample(chunks, row.expand(20, -1))
        for i, one in enumerate(chunks):
            logprob = sampled[one.request_id].logprob
            assert logprob is not None
            assert dict(logprob.top) == pytest.approx(expected_logprobs(row, (i, i + 1), 1), abs=1e-5)
        sampler.retire([c.request_id for c in chunks[::-1]])
        sampler.retire(["never seen"])
        assert sampler.remembered() == 0


def asking(tokens: tuple[int, ...], start: int, prompt_length: int) -> Chunk:
    params = SamplingParams(prompt_logprobs=2, repetition_penalty=1.5)
    return chunk(tokens, start, prompt_length, params=params)


@pytest.mark.parametrize("borders", [(9,), (1, 9), (4, 5, 9), (3, 8, 9, 10), tuple(range(1, 12))])
def test_prompt_logprobs_do_not_depend_on_chunks(borders: tuple[int, ...]) -> None:
    tokens = tuple(torch.randint(0, VOCABULARY, (11,), generator=torch.Generator().manual_seed(1)).tolist())
    prompt_length = 9
    logits = torch.randn(11, VOCABULARY, generator=torch.Generator().manual_seed(2)).bfloat16()
    logprobs = logits.float().log_softmax(-1)
    sampler = Sampler(VOCABULARY)
    found: list[TokenLogprob | None] = []
    start = 0
    for end in borders:
        part = sampler.prompt_logprobs(asking(tokens[start:end], start, prompt_length), logits[start:end])
        assert isinstance(part, tuple)
        assert len(part) == max(0, min(end, prompt_length) - start)
        found += part
        start = end
    assert found[0] is None
    assert len(found) == prompt_length
    for position, entry in enumerate(found[1:], start=1):
        assert entry is not None
        predicted = logprobs[position - 1]
        assert entry.token == tokens[position]
        assert entry.logprob == pytest.approx(predicted[tokens[position]].item(), abs=1e-6)
        assert [i for i, _ in entry.top] == predicted.topk(2).indices.tolist()
    sampler.observe([chunk((tokens[-1],), 11, prompt_length, params=SamplingParams(prompt_logprobs=2))])
    assert sampler.remembered() == 0  # nothing is kept past the prompt


def test_prompt_logprobs_of_a_step_that_runs_again_are_the_same() -> None:
    logits = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(3))
    sampler = Sampler(VOCABULARY)
    for tokens, start in (((1, 2), 0), ((3, 4), 2), ((5, 6), 4)):
        once, again = (sampler.prompt_logprobs(asking(tokens, start, 6), logits[start : start + 2]) for _ in range(2))
        assert once == again


def test_a_failed_observation_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step runs again in halves; what was not written must be written then."""
    good = chunk((1, 2), 0, 2, request_id="good")
    bad = chunk((VOCABULARY,), 0, 1, request_id="bad")
    counts = TokenCounts(VOCABULARY, torch.device("cpu"))
    with pytest.raises(IndexError):
        counts.observe([good, bad])
    counts.observe([good])
    later = replace(good, tokens=(3,), start=2)
    with pytest.raises(IndexError):
        counts.observe([later, bad])
    counts.observe([later])
    assert counts.is_current(later)
    assert counts.seen(["good"], VOCABULARY)[0].nonzero().flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("number", [0, 1])
def test_rows_that_found_no_memory_are_made_later(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tables grow or none does: rows that only one of them has would fail every later penalty."""
    first = chunk((1, 2), 0, 2, request_id="first")
    counts = TokenCounts(VOCABULARY, torch.device("cpu"))
    original, calls = torch.cat, [0]

    def cat(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] - 1 == number:
            raise torch.OutOfMemoryError
        return original(*arguments)

    monkeypatch.setattr(torch, "cat", cat)
    with pytest.raises(torch.OutOfMemoryError):
        counts.observe([first])
    requests = [replace(first, request_id=str(row)) for row in range(20)]
    counts.observe(requests)
    assert counts.output(["7"], VOCABULARY).sum() == 0
    for request in requests:
        assert counts.seen([request.request_id], VOCABULARY)[0].nonzero().flatten().tolist() == [1, 2]


def test_prompt_logprobs_begin_anew_after_preemption_and_notice_a_gap() -> None:
    logits = torch.randn(6, VOCABULARY)
    sampler = Sampler(VOCABULARY)
    sampler.prompt_logprobs(asking((1, 2, 3), 0, 6), logits[:3])
    assert sampler.remembered() == 1
    whole = sampler.prompt_logprobs(asking((1, 2, 3, 4, 5, 6), 0, 6), logits)
    assert isinstance(whole, tuple)
    assert len(whole) == 6
    with pytest.raises(ValueError, match="no logits kept"):
        sampler.prompt_logprobs(asking((4, 5, 6), 3, 6), logits[3:])
    sampler.prompt_logprobs(asking((1, 2, 3), 0, 6), logits[:3])
    sampler.retire(["r#0"])
    assert sampler.remembered() == 0


def test_prompt_logprobs_of_bad_logits_are_a_failure() -> None:
    logits = torch.zeros(3, VOCABULARY)
    logits[1, 4] = float("nan")
    found = Sampler(VOCABULARY).prompt_logprobs(asking((1, 2, 3), 0, 5), logits)
    assert isinstance(found, RequestFailure)
    assert found.code == "NUMERIC"


def test_a_long_prompt_is_worked_in_parts() -> None:
    tokens = tuple(i % VOCABULARY for i in range(200))
    logits = torch.randn(200, VOCABULARY)
    found = Sampler(VOCABULARY).prompt_logprobs(asking(tokens, 0, 200), logits)
    expected = logits.log_softmax(-1)[range(199), tokens[1:]].tolist()
    assert isinstance(found, tuple)
    assert [entry.logprob for entry in found if entry] == pytest.approx(expected, abs=1e-6)
