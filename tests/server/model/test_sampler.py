"""The sampler against Hugging Face's own processors, plain log_softmax, and itself among other batch mates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loramux_server.engine.plan import BASE_SLOT, Chunk, Sampled
from loramux_server.model.sampler import Sampler
from loramux_server.requests import SamplingParams
from support.chi_square import chi_square_p_value

GREEDY = SamplingParams(temperature=0.0)


def make_chunk(
    request_id: str = "r#0",
    params: SamplingParams = GREEDY,
    tokens: Sequence[int] = (1, 2, 3),
    start: int = 0,
    prompt_length: int = 3,
    history: tuple[int, ...] | None = None,
    samples: bool = True,
) -> Chunk:
    return Chunk(request_id, tuple(tokens), start, (0,), BASE_SLOT, samples, params, prompt_length, history)


def make_logits(rows: int, vocabulary: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def sample_one(params: SamplingParams, row: Tensor, **chunk: object) -> Sampled:
    sampled, failures = Sampler(row.numel()).sample([make_chunk(params=params, **chunk)], row[None])  # type: ignore[arg-type]
    assert not failures
    return sampled["r#0"]


def draw_many(params: SamplingParams, row: Tensor, draws: int) -> Tensor:
    """Counts by token over seeds 0 .. draws - 1."""
    chunks = [make_chunk(f"r{i}#0", dataclasses.replace(params, seed=i)) for i in range(draws)]
    sampled, failures = Sampler(row.numel()).sample(chunks, row.expand(draws, -1))
    assert not failures
    return torch.bincount(torch.tensor([s.token for s in sampled.values()]), minlength=row.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_best_and_the_lowest_id_among_equals(dtype: torch.dtype) -> None:
    logits = make_logits(6, 1003).to(dtype)
    logits[0, [17, 900]] = 50.0
    logits[1, [1002, 3]] = 50.0
    chunks = [make_chunk(f"{i}") for i in range(6)]
    sampled, failures = Sampler(1003).sample(chunks, logits)
    best = logits.float().numpy().argmax(axis=1)  # numpy documents the first occurrence
    assert [sampled[str(i)].token for i in range(6)] == best.tolist()
    assert (sampled["0"].token, sampled["1"].token) == (17, 3)
    assert not failures
    assert all(s.logprob is None for s in sampled.values())


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.8, top_p=0.8),
        SamplingParams(temperature=1.0, top_p=0.3),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.3, top_k=20, top_p=0.9),
        SamplingParams(temperature=1.0, min_p=0.1),
        SamplingParams(temperature=1.5, top_k=30, top_p=0.95, min_p=0.02),
    ],
)
def test_draws_follow_the_distribution_of_hugging_faces_warpers(params: SamplingParams) -> None:
    row = make_logits(1, 60, seed=4, spread=1.5)[0]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), row[None].clone())[0].softmax(-1).double()
    counts = draw_many(params, row, 12000)
    assert counts[expected == 0].sum() == 0
    assert chi_square_p_value(counts, expected) > 1e-3


def test_every_kept_token_can_be_drawn_and_no_other() -> None:
    row = torch.arange(12, 0, -1).float() / 8
    for top_p in (0.05, 0.35, 0.6, 0.99):
        kept = TopPLogitsWarper(top_p)(torch.zeros(1, 1), row[None].clone())[0].isfinite()
        counts = draw_many(SamplingParams(top_p=top_p), row, 6000)
        assert torch.equal(counts > 0, kept)


def test_a_hard_filter_over_a_flat_distribution_ends() -> None:
    row = torch.arange(32000).float() * 1e-4
    assert sample_one(SamplingParams(top_p=0.0), row).token == 31999
    assert sample_one(SamplingParams(top_p=1e-9), row).token == 31999
    assert sample_one(SamplingParams(top_k=1), row).token == 31999
    assert sample_one(SamplingParams(min_p=1.0), row).token == 31999
    assert sample_one(SamplingParams(temperature=1e-30), row).token == 31999
    assert sample_one(SamplingParams(top_k=31999, top_p=0.5, temperature=100.0), row).token < 32000


def mixed_params() -> list[SamplingParams]:
    return [
        GREEDY,
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_p=0.7),
        SamplingParams(seed=3, top_k=40),
        SamplingParams(seed=4, top_k=3000, top_p=0.99),
        SamplingParams(seed=5, min_p=0.05, temperature=1.7),
        SamplingParams(seed=6, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=-0.3),
        SamplingParams(seed=2**64 - 1, choice=3, temperature=0.2),
        SamplingParams(temperature=0.0, logprobs=5, repetition_penalty=1.1),
        SamplingParams(seed=8, logprobs=2, logit_bias={5: 4.0, 900: -100.0}),
        SamplingParams(seed=9, top_p=0.05, logprobs=0, suppressed=(1, 2), min_tokens=4),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [32000, 50257])
def test_a_row_gives_the_same_alone_and_among_batch_mates(vocabulary: int, dtype: torch.dtype) -> None:
    params = mixed_params()
    logits = make_logits(len(params), vocabulary).to(dtype)
    chunks = [make_chunk(f"{i}", p, tokens=range(i, i + 8), prompt_length=5) for i, p in enumerate(params)]
    together, failures = Sampler(vocabulary).sample(chunks, logits)
    assert not failures
    assert len(together) == len(params)
    for order in ([10, 3, 6, 0], [2, 4], [9, 8, 7, 5, 1]):
        some, _ = Sampler(vocabulary).sample([chunks[i] for i in order], logits[order])
        assert some == {str(i): together[str(i)] for i in order}
    for i, chunk in enumerate(chunks):
        alone, _ = Sampler(vocabulary).sample([chunk], logits[i : i + 1].clone())
        assert alone == {str(i): together[str(i)]}


def test_a_row_is_sampled_over_the_vocabulary_of_its_own_adapter() -> None:
    """Bit for bit as by a sampler of that vocabulary: no sum, rank or draw sees a neighbor's width."""
    wide, widths = 4100, [4000, 4100, 3900]
    params = [
        dataclasses.replace(each, logit_bias={3950: 3.0, 4050: 9.0}, suppressed=(3, 4099), min_tokens=4)
        for each in mixed_params()
    ]
    tokens = (1, 3899, 3899, 7, 3898, 3899, 20, 3899)  # of which three are output
    logits = make_logits(len(params) * 3, wide)
    chunks = [make_chunk(f"{i}", params[i % len(params)], tokens=tokens, prompt_length=5) for i in range(len(logits))]
    own = [widths[i % 3] for i in range(len(logits))]
    for row, width in zip(logits, own, strict=True):
        row[width:] = torch.tensor([torch.nan, 1e9, torch.inf, -1.0]).repeat(wide)[: wide - width]
    sampler = Sampler(4000)
    sampler.widen(wide)
    together, failures = sampler.sample(chunks, logits, own)
    assert not failures
    for i, (chunk, width) in enumerate(zip(chunks, own, strict=True)):
        alone, _ = Sampler(width).sample([chunk], logits[i : i + 1, :width].clone())
        assert alone == {f"{i}": together[f"{i}"]}, (i, width)
    assert {together[f"{i}"].token >= 4000 for i in range(len(logits)) if own[i] == wide} >= {True}


def test_what_is_counted_outlives_the_first_wider_step() -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.5)
    first = make_chunk("base", params, tokens=(1, 2, 3, 9), prompt_length=3)
    sampler = Sampler(64)
    sampler.observe([first])
    sampler.widen(80)
    wide = make_chunk("wide", params, tokens=(1, 70, 75), prompt_length=2)
    logits = make_logits(2, 80)
    together, _ = sampler.sample([first, wide], logits, [64, 80])
    assert together["base"] == Sampler(64).sample([first], logits[:1, :64])[0]["base"]
    assert together["wide"] == Sampler(80).sample([wide], logits[1:])[0]["wide"]


def test_fewer_logits_than_a_row_has_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="for 1 chunks"):
        Sampler(64).sample([make_chunk()], make_logits(1, 64), [80])


def test_input_logits_are_left_as_they_were() -> None:
    params = mixed_params()
    logits = make_logits(len(params), 4000)
    before = logits.clone()
    Sampler(4000).sample([make_chunk(f"{i}", p) for i, p in enumerate(params)], logits)
    assert torch.equal(logits, before)


def test_tokens_depend_on_seed_choice_and_position_alone() -> None:
    row = torch.zeros(4096)
    params = SamplingParams(seed=11)
    first = sample_one(params, row, tokens=range(7), prompt_length=7)
    split = sample_one(params, row, tokens=(6,), start=6, prompt_length=7)
    other_tokens = sample_one(params, row, tokens=(9,) * 7, prompt_length=2)
    assert first == split == other_tokens
    assert first != sample_one(params, row, tokens=range(8))
    assert first != sample_one(dataclasses.replace(params, choice=1), row, tokens=range(7))
    assert first != sample_one(dataclasses.replace(params, seed=12), row, tokens=range(7))


@pytest.mark.parametrize("bad", ["nan", "inf", "all -inf"])
@pytest.mark.parametrize("params", [GREEDY, *mixed_params()[1:]])
def test_a_bad_row_fails_alone(bad: str, params: SamplingParams) -> None:
    logits = make_logits(3, 1000)
    if bad == "all -inf":
        logits[1] = float("-inf")
    else:
        logits[1, 2] = float(bad)  # id 2 is forbidden in the last of the parameters: no excuse
    chunks = [make_chunk("a", params), make_chunk("b", params), make_chunk("c", params)]
    sampled, failures = Sampler(1000).sample(chunks, logits)
    good, _ = Sampler(1000).sample([chunks[0], chunks[2]], logits[[0, 2]])
    assert sampled == good
    assert failures.keys() == {"b"}
    assert failures["b"].code == "NUMERIC"


def test_minus_infinity_in_some_places_is_no_failure() -> None:
    row = torch.full((50,), float("-inf"))
    row[[7, 9]] = 1.0
    assert sample_one(GREEDY, row).token == 7
    counts = draw_many(SamplingParams(), row, 400)
    assert counts[7] + counts[9] == 400
    assert counts[7] > 100
    assert counts[9] > 100


def test_a_row_with_every_token_forbidden_fails() -> None:
    params = SamplingParams(suppressed=tuple(range(20)), min_tokens=1)
    sampled, failures = Sampler(20).sample([make_chunk(params=params)], torch.zeros(1, 20))
    assert not sampled
    assert failures["r#0"].code == "NUMERIC"


def test_logit_bias_is_added_before_temperature() -> None:
    row = torch.zeros(10)
    assert sample_one(SamplingParams(temperature=0.0, logit_bias={4: 0.5, 3: -1.0, 99: 5.0}), row).token == 4
    counts = draw_many(SamplingParams(temperature=0.5, logit_bias={4: 1.0}), row, 6000)
    expected = (torch.nn.functional.one_hot(torch.tensor(4), 10) * 2.0).softmax(-1)
    assert chi_square_p_value(counts, expected) > 1e-3


def test_suppressed_tokens_return_with_min_tokens() -> None:
    row = torch.zeros(10)
    row[3] = 5.0
    params = SamplingParams(temperature=0.0, suppressed=(3, 10_000), min_tokens=2)
    tokens = [
        sample_one(params, row, tokens=(0,) * (3 + output), prompt_length=3, start=0).token for output in range(4)
    ]
    assert tokens == [0, 0, 3, 3]


def test_logprobs_are_those_of_the_adjusted_logits_before_temperature() -> None:
    row = make_logits(1, 500, seed=9)[0]
    bias = {7: 6.0, 8: -6.0}
    params = SamplingParams(temperature=0.3, top_k=2, seed=5, logprobs=4, logit_bias=bias)
    sampled = sample_one(params, row)
    adjusted = row.clone()
    adjusted[7] += 6.0
    adjusted[8] -= 6.0
    expected = adjusted.log_softmax(-1)
    assert sampled.logprob is not None
    assert sampled.logprob.token == sampled.token
    assert sampled.logprob.logprob == pytest.approx(expected[sampled.token].item(), abs=1e-6)
    best = expected.topk(4)
    assert [i for i, _ in sampled.logprob.top] == best.indices.tolist()
    assert [v for _, v in sampled.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_alternatives_break_ties_by_id_whatever_the_neighbors_ask_for() -> None:
    row = torch.zeros(300)
    row[[250, 20]] = 1.0
    row[5] = float("-inf")
    chunks = [make_chunk(f"{n}", dataclasses.replace(GREEDY, logprobs=n)) for n in (0, 1, 4, 9)]
    sampled, _ = Sampler(300).sample(chunks, row.expand(4, -1))
    tops = {key: [i for i, _ in s.logprob.top] for key, s in sampled.items() if s.logprob}
    assert tops == {"0": [], "1": [20], "4": [20, 250, 0, 1], "9": [20, 250, 0, 1, 2, 3, 4, 6, 7]}


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="logits"):
        Sampler(10).sample([make_chunk()], torch.zeros(2, 10))
    assert Sampler(10).sample([], torch.zeros(0, 10)) == ({}, {})


def test_repetition_penalty_equals_hugging_faces() -> None:
    logits = make_logits(2, 100)
    tokens = (3, 4, 4, 50, 99)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([tokens]), logits[:1].clone())[0].log_softmax(-1)
    params = SamplingParams(temperature=0.0, repetition_penalty=1.7, logprobs=100)
    chunks = [make_chunk("a", params, tokens, prompt_length=3), make_chunk("b")]
    sampled, failures = Sampler(100).sample(chunks, logits)
    assert not failures
    assert dict(sampled["a"].logprob.top) == pytest.approx(  # type: ignore[union-attr]
        dict(enumerate(expected.tolist())), abs=1e-5
    )
    assert sampled["b"].token == logits[1].argmax()
