"""Scenarios beyond one static batch: who asks for what, in what order, and what is counted; drivers are scripted."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from loramux.bench import report
from loramux.bench.driver import EVICTIONS, LOADS, PROCESSOR_SECONDS, Call, Trace
from loramux.bench.main import BenchOptions, run
from loramux.bench.session import measure, send, sent_beside
from loramux.bench.stats import Sample, sample, summarize
from loramux.bench.workload import INVOCATION, Member, Scenario, Workload, WorkloadInvalid, parse_workload
from loramux.machine import describe
from support.scripted_driver import ScriptedDriver

TEXT = """
name = "t"
shape = "tiny"
requests = 6
at_once = 2
prompt_tokens = 12
output_tokens = 3
rounds = 1
warmup = 0
seed = 5
[[scenarios]]
name = "one"
distinct = 1
"""


def _workload(**changes: object) -> Workload:
    return replace(parse_workload(TEXT), **changes)  # type: ignore[arg-type]


def _quiet(_: str) -> None:
    """Announces nothing."""


# Who asks for what


def test_adapters_of_two_scenarios_are_made_once() -> None:
    few, ranks = Scenario("few", 2), Scenario("ranks", 4, ranks=(8, 64))
    workload = _workload(scenarios=(few, ranks, Scenario("beside", 0, beside=3)))
    assert workload.members_of(few) == (Member("lora", 8, 0), Member("lora", 8, 1))
    assert workload.members_of(ranks) == (
        Member("lora", 8, 0), Member("lora", 64, 1), Member("lora", 8, 2), Member("lora", 64, 3),
    )  # fmt: skip
    assert workload.members == (
        Member("lora", 8, 0), Member("lora", 8, 1), Member("lora", 64, 1), Member("lora", 8, 2), Member("lora", 64, 3),
    )  # fmt: skip
    assert [call.adapter for call in workload.calls(ranks, 0, 100)] == [0, 2, 3, 4, 0, 2]
    assert sorted(call.adapter or 0 for call in workload.calls_beside(workload.scenarios[2], 0, 100)) == [0, 1, 3]


def test_zipf_asks_for_the_first_most_and_uniform_for_all_alike() -> None:
    zipf, uniform = Scenario("z", 100, draw="zipf"), Scenario("u", 100, draw="uniform")
    workload = _workload(requests=20_000, scenarios=(zipf, uniform))
    often = Counter(workload.assignment(zipf, 1))
    assert workload.assignment(zipf, 1) == workload.assignment(zipf, 1) != workload.assignment(zipf, 2)
    # 1 / H(100) is 0.193 of 20,000; the second half of it, a tenth a tenth. Three standard deviations are 170.
    assert abs(often[0] - 3855) < 170
    assert abs(often[1] - 1928) < 130
    assert abs(often[9] - 386) < 60
    alike = Counter(workload.assignment(uniform, 1))
    assert set(alike) == set(range(100))
    assert max(alike.values()) < 275
    steep = Counter(workload.assignment(replace(zipf, exponent=3.0), 1))
    assert steep[0] > 16_000


@pytest.mark.asyncio
async def test_lengths_differ_alike_in_every_scenario() -> None:
    scenarios = (Scenario("base", 0), Scenario("z", 9, draw="zipf"))
    workload = _workload(requests=40, output_tokens=6, output_spread=4, scenarios=scenarios)
    lengths = [[call.output_tokens for call in workload.calls(scenario, 1, 100)] for scenario in scenarios]
    assert lengths[0] == lengths[1]
    assert set(lengths[0]) == set(range(2, 11))
    assert lengths[0] != [call.output_tokens for call in workload.calls(scenarios[0], 2, 100)]
    assert not workload.is_static
    samples = await measure(workload, [ScriptedDriver()], 100, _quiet)
    total = sum(call.output_tokens for call in workload.calls(scenarios[0], 0, 100))
    assert [taken.output_tokens for taken in samples] == [total, total]
    with pytest.raises(WorkloadInvalid, match="some answers of 3 tokens would have fewer than 2"):
        parse_workload(TEXT.replace("output_tokens = 3", "output_tokens = 3\noutput_spread = 2"))


def test_an_activated_adapter_is_activated_in_the_middle_and_no_other() -> None:
    scenario = Scenario("kinds", 2, kinds=("lora", "alora"))
    workload = _workload(scenarios=(scenario,))
    prompts, calls = workload.prompts(0, 100), workload.calls(scenario, 0, 100)
    assert calls[0].prompt == prompts[0]
    assert calls[1].prompt == (*prompts[1][:3], *INVOCATION, *prompts[1][6:])


def test_only_batches_of_lora_are_for_a_peer() -> None:
    plain = _workload(at_once=0)
    assert plain.is_static
    assert _workload(at_once=6).is_static
    assert not _workload().is_static
    assert not replace(plain, settle=1).is_static
    for scenario in (
        Scenario("a", 1, draw="zipf"), Scenario("b", 1, kinds=("lora", "dora")), Scenario("c", 0, beside=1),
    ):  # fmt: skip
        assert not replace(plain, scenarios=(*plain.scenarios, scenario)).is_static


def test_the_peer_is_left_out_or_refused_where_it_cannot_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, said = tmp_path / "w.toml", list[str]()
    file.write_text(TEXT)
    options = BenchOptions(str(file), ("engine", "peft"), cache=tmp_path, out=tmp_path, dtype="float32")

    async def measured(_: Workload, drivers: list[object], *__: object) -> list[Sample]:
        assert [type(driver).__name__ for driver in drivers] == ["EngineDriver"]
        return [_sample("one", 1, (1.0,))]

    for name in ("make_checkpoint", "make_members"):
        monkeypatch.setattr(f"loramux.bench.main.{name}", lambda *_: [])
    monkeypatch.setattr("loramux.bench.main.measure", measured)
    assert "drivers engine\n" in run(options, said.append).page
    assert "peft driver is left out" in said[0]
    with pytest.raises(WorkloadInvalid, match="peft cannot run it"):
        run(replace(options, drivers=("peft",)), _quiet)


# How it is sent


@pytest.mark.asyncio
async def test_no_more_than_so_many_are_on_their_way_and_all_are_sent() -> None:
    driver, calls = ScriptedDriver(), [Call((i,), None) for i in range(7)]
    assert len(await send(driver, calls, 3, "s", 3)) == 7
    assert driver.most_at_once == 3
    assert sorted(call.prompt for _, sent in driver.runs for call in sent) == [(i,) for i in range(7)]
    together = ScriptedDriver()
    await send(together, calls, 3, "s", 7)
    assert [len(sent) for _, sent in together.runs] == [7]


@pytest.mark.asyncio
async def test_what_goes_on_beside_goes_in_circles_until_the_end() -> None:
    driver, calls = ScriptedDriver(), [Call((i,), i) for i in range(3)]
    async with sent_beside(driver, calls, "s"):
        for _ in range(8):
            await asyncio.sleep(0)
    asked = [sent[0].adapter for _, sent in driver.runs]
    assert len(asked) > 3
    assert asked == [i % 3 for i in range(len(asked))]
    assert driver.most_at_once == 1
    assert set(driver.lengths) == {1}
    after = len(asked)
    await asyncio.sleep(0)
    assert len(driver.runs) == after
    async with sent_beside(driver, [], "s"):
        await asyncio.sleep(0)
    assert len(driver.runs) == after


@pytest.mark.asyncio
async def test_a_failure_beside_fails_the_run() -> None:
    class Failing(ScriptedDriver):
        async def run(self, calls: object, output_tokens: int, salt: str) -> list[Trace]:
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        async with sent_beside(Failing(), [Call((1,), None)], "s"):
            await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_what_settles_a_run_is_sent_before_and_not_counted() -> None:
    workload, driver = _workload(settle=4, short_prompt_tokens=5), ScriptedDriver()
    (taken,) = await measure(workload, [driver], 100, _quiet)
    assert driver.lengths == [1] * 4 + [3] * 6
    assert {len(sent[0].prompt) for _, sent in driver.runs[:4]} == {5}
    assert driver.most_at_once == 2
    assert taken.output_tokens == 18
    assert taken.counted == {LOADS: 6, EVICTIONS: 3, PROCESSOR_SECONDS: 3.0}


# What is told


def _sample(scenario: str, number: int, first: tuple[float, ...], gap: float = 0.01, **counted: float) -> Sample:
    traces = [Trace(0.0, (wait, wait + gap)) for wait in first]
    return sample("d", scenario, number, traces, counted)


def test_ratios_of_the_slowest_are_taken_inside_a_round() -> None:
    # The second round is ten times slower for both: over all rounds the ratio would be lost.
    samples = [
        _sample("fits", 1, (0.1, 0.2), loads=0, evictions=0, processor_seconds=1.0),
        _sample("more", 1, (0.1, 0.3), gap=0.02, loads=4, evictions=3, processor_seconds=2.0),
        _sample("fits", 2, (1.0, 2.0), gap=0.1, loads=0, evictions=0, processor_seconds=10.0),
        _sample("more", 2, (1.0, 3.0), gap=0.2, loads=6, evictions=5, processor_seconds=20.0),
    ]
    fits, more = summarize(samples, ["fits", "more"])
    assert (fits.first_token_ratio, fits.inter_token_ratio, fits.processor_ratio) == (1.0, 1.0, 1.0)
    assert more.first_token_ratio == pytest.approx(1.5)
    assert more.inter_token_ratio == pytest.approx(2.0)
    assert more.processor_ratio == pytest.approx(0.5)
    assert (more.first_token_p99, more.first_token_longest) == (3.0, 3.0)
    assert more.inter_token_p99 == pytest.approx(0.2)
    assert (more.loads, more.evictions, more.rounds) == (5, 4, 2)


def test_the_table_of_the_slowest_leaves_empty_what_a_driver_cannot_know() -> None:
    full, empty = _sample("a", 1, (0.25,), loads=4, evictions=3, processor_seconds=1.0), _sample("a", 1, (0.25,))
    assert report.tails(summarize([full], ["a"]))[2] == (
        "| d | a | 250.0 | 1.00 | 250.0 | 10.0 | 1.00 | 1.00 | 4 | 3 |"
    )
    summaries = summarize([empty], ["a"])
    assert report.tails(summaries)[2] == "| d | a | 250.0 | 1.00 | 250.0 | 10.0 | 1.00 |  |  |  |"
    values = report.document(_workload(), describe(), summaries, [empty], {}, datetime(2026, 1, 2, tzinfo=UTC))
    assert math.isnan(summaries[0].loads)
    assert json.loads(json.dumps(values, allow_nan=False))["summary"][0]["loads"] is None
