"""The bench's arithmetic, workload files, shapes, order of rounds and report; drivers are scripted."""

from __future__ import annotations

import dataclasses
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramux.bench import report
from loramux.bench.driver import DriverFailed, Trace
from loramux.bench.main import BenchOptions, run
from loramux.bench.marks import marked_kernels
from loramux.bench.peft_driver import PeftDriver
from loramux.bench.profile import UNSEEN, StepProfile, find_group, group_operations, median_parts, with_unseen
from loramux.bench.session import measure, round_order
from loramux.bench.shapes import get_shape, make_adapters, make_checkpoint
from loramux.bench.stats import Sample, percentile, sample, summarize
from loramux.bench.workload import AdapterPlan, Scenario, WorkloadInvalid, parse_workload, read_workload, shipped
from loramux.machine import describe
from loramux_adapters.kernels.native_low_rank import find_native
from loramux_adapters.kernels.protocol import LowRankPools, SlotSegment
from loramux_adapters.parts.rank_rows import RankRows
from support.scripted_driver import ScriptedDriver

TEXT = """
name = "t"
shape = "tiny"
requests = 4
prompt_tokens = 8
output_tokens = 3
rounds = 2
warmup = 1
seed = 5
[[scenarios]]
name = "base"
distinct = 0
[[scenarios]]
name = "k=2"
distinct = 2
"""


# Workloads


def test_shipped_workloads_are_valid_and_measure_what_the_readme_says() -> None:
    assert {"mixed-125m", "mixed-tiny"} < set(shipped())
    workload = read_workload("mixed-125m")
    assert (workload.requests, workload.prompt_tokens, workload.output_tokens) == (16, 128, 64)
    assert [scenario.distinct for scenario in workload.scenarios] == [0, 1, 4, 16]
    assert workload.adapters == AdapterPlan(rank=8, alpha=16.0)
    for name in shipped():
        get_shape(read_workload(name).shape)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("requests = 4", "requests = 0"), "requests"),
        (("seed = 5", "seed = true"), "seed"),
        (("seed = 5", "speed = 5"), "speed: unknown key"),
        (('name = "t"', 'name = "../t"'), "name"),
        (("distinct = 2", "distinct = 5"), "more distinct adapters"),
        (("distinct = 0", 'distinct = 0\ndraw = "dice"'), "draw"),
        (('name = "k=2"', 'name = "base"'), "must differ"),
        (("output_tokens = 3", "output_tokens = 1"), "output_tokens"),
        (("[[scenarios]]", "[adapters]\nalpha = -1.0\n[[scenarios]]"), "alpha"),
        (('name = "t"', "name = "), "not TOML"),
    ],
)
def test_a_wrong_workload_names_its_key(change: tuple[str, str], words: str) -> None:
    with pytest.raises(WorkloadInvalid, match=words):
        parse_workload(TEXT.replace(*change, 1))


def test_a_missing_workload_lists_the_shipped(tmp_path: Path) -> None:
    with pytest.raises(WorkloadInvalid, match="mixed-125m"):
        read_workload(str(tmp_path / "none.toml"))


def test_prompts_follow_from_seed_and_round_and_differ() -> None:
    workload = parse_workload(TEXT)
    prompts = workload.prompts(0, 100)
    assert prompts == workload.prompts(0, 100)
    assert len({*prompts, *workload.prompts(1, 100)}) == 8
    assert all(3 <= token < 100 for prompt in prompts for token in prompt)
    assert workload.assignment(Scenario("k", 2)) == (0, 1, 0, 1)
    assert workload.assignment(Scenario("base", 0)) == (None,) * 4


# Statistics


def test_a_sample_is_what_the_traces_say() -> None:
    taken = sample("d", "s", 0, [Trace(1.0, (2.0, 3.0, 5.0)), Trace(1.5, (2.0, 4.0))])
    assert taken.output_tokens == 5
    assert taken.seconds == 4.0
    assert taken.rate == 1.25
    assert taken.first_token == (1.0, 0.5)
    assert taken.inter_token == (1.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="no token"):
        sample("d", "s", 0, [Trace(0.0, ())])


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_a_percentile_is_a_value_with_enough_below(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    assert percentile(values, 1.0) == max(values)


def _sample(driver: str, scenario: str, number: int, rate: float) -> Sample:
    return Sample(driver, scenario, number, int(rate * 10), 10.0, (0.1, 0.2), (0.01, 0.03))


def test_ratios_are_taken_inside_a_round() -> None:
    # The machine is twice as fast in round 1: a ratio of medians would hide that each round says one half.
    samples = [_sample("a", "k", n, 50.0 * f) for n, f in enumerate((1, 2, 1))]
    samples += [_sample("a", "base", n, 100.0 * f) for n, f in enumerate((1, 2, 1))]
    samples += [_sample("b", "k", 0, 10.0)]
    base, mixed, alone = summarize(samples, ["base", "k"])
    assert (base.driver, base.scenario, base.ratio) == ("a", "base", 1.0)
    assert (mixed.rate, mixed.rate_low, mixed.rate_high, mixed.ratio) == (50.0, 50.0, 100.0, 0.5)
    assert (mixed.first_token_p50, mixed.first_token_p95) == (0.1, 0.2)
    assert math.isnan(alone.ratio)


# Session


@pytest.mark.asyncio
async def test_rounds_rotate_and_warm_up_is_forgotten() -> None:
    workload, driver = parse_workload(TEXT), ScriptedDriver()
    samples = await measure(workload, [driver], 100, lambda message: None)
    assert [salt for salt, _ in driver.runs] == ["0/base", "0/k=2", "1/k=2", "1/base", "2/base", "2/k=2"]
    assert [(s.scenario, s.round_number) for s in samples] == [("k=2", 1), ("base", 1), ("base", 2), ("k=2", 2)]
    first, second = driver.runs[0][1], driver.runs[1][1]
    assert [call.prompt for call in first] == [call.prompt for call in second]
    assert [call.adapter for call in second] == [0, 1, 0, 1]
    assert driver.closed == 1


@pytest.mark.asyncio
async def test_a_driver_that_gives_too_few_tokens_fails_the_bench_and_all_are_closed() -> None:
    good, bad = ScriptedDriver(), ScriptedDriver(short=True)
    with pytest.raises(DriverFailed, match="2 tokens, not 3"):
        await measure(parse_workload(TEXT), [good, bad], 100, lambda message: None)
    assert (good.closed, bad.closed) == (1, 1)


@pytest.mark.asyncio
async def test_a_driver_that_cannot_be_closed_keeps_no_other_from_it() -> None:
    class Stuck(ScriptedDriver):
        async def close(self) -> None:
            raise RuntimeError("stuck")

    first, last = ScriptedDriver(), ScriptedDriver()
    with pytest.raises(RuntimeError, match="stuck"):
        await measure(parse_workload(TEXT), [first, Stuck(), last], 100, lambda message: None)
    assert (first.closed, last.closed) == (1, 1)


@pytest.mark.asyncio
async def test_a_peer_that_died_does_not_hide_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux.bench.peer.sys.executable", "/bin/false")
    driver = PeftDriver(tmp_path, [], threads=1, dtype="float32", log=tmp_path / "log")
    with pytest.raises(DriverFailed, match="peer ended"):
        await driver.start()
    with pytest.raises(DriverFailed, match="peer ended"):
        await driver.run([], 1, "")  # into a pipe that nobody reads: what is written stays for close to flush
    await driver.close()


def test_every_scenario_comes_first_in_some_round() -> None:
    scenarios = [Scenario(name, i) for i, name in enumerate("abc")]
    orders = [round_order(scenarios, number) for number in range(3)]
    assert {order[0].name for order in orders} == set("abc")
    assert all(sorted(s.name for s in order) == ["a", "b", "c"] for order in orders)


# Report


def test_the_report_holds_the_numbers_and_the_machine(tmp_path: Path) -> None:
    workload = parse_workload(TEXT)
    samples = [_sample("a", "base", 1, 100.0), _sample("a", "k=2", 1, 80.0)]
    summaries = summarize(samples, ["base", "k=2"])
    machine, taken = describe(), datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
    values = report.document(workload, machine, summaries, samples, {"threads": 2}, taken)
    page = report.markdown(workload, machine, summaries, {"threads": 2}, taken)
    report.prepare(tmp_path / "new")
    json_path, page_path = report.write(tmp_path / "new", "t", values, page)
    read = json.loads(json_path.read_text())
    assert read["format"] == report.FORMAT
    assert [entry["ratio"] for entry in read["summary"]] == [1.0, 0.8]
    assert read["machine"]["cpu"] == machine.cpu
    assert read["rounds"][1]["rate"] == 80.0
    assert "| a | k=2 | 80.0 |" in page_path.read_text()
    assert "0.80" in page
    assert machine.cpu in page
    assert "without its optional hub kernel" in report.markdown(
        workload, dataclasses.replace(machine, versions={}), summaries, {}, taken
    )
    assert "hub kernel" not in report.markdown(
        workload, dataclasses.replace(machine, versions={"kernels": "1"}), summaries, {}, taken
    )


def test_another_machine_is_not_described_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def measured(*_: object) -> list[Sample]:
        return [_sample("grpc", "base", 1, 100.0)]

    monkeypatch.setattr("loramux.bench.main.measure", measured)
    for name in ("make_checkpoint", "make_members"):
        monkeypatch.setattr(f"loramux.bench.main.{name}", lambda *_: [])
    pages = {
        drivers: run(
            BenchOptions("mixed-tiny", drivers, "far.away:50051", threads=3, dtype="float32", out=tmp_path), str
        ).page
        for drivers in (("grpc",), ("engine", "grpc"))
    }
    assert all("far.away:50051" in page for page in pages.values())
    assert "threads" not in pages["grpc",]
    assert "threads 3" in pages["engine", "grpc"]


# Shapes, on the smallest one


def test_checkpoint_and_adapters_are_what_they_say(tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    path = make_checkpoint("tiny", 1, tmp_path)
    assert make_checkpoint("tiny", 1, tmp_path) == path
    config, shape = AutoConfig.from_pretrained(path), get_shape("tiny")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (128, 2, 1024)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == shape.vocabulary
    assert tokenizer.decode(tokenizer.encode("häuser & co")) == "häuser & co"

    first, second = make_adapters("tiny", AdapterPlan(rank=4, alpha=8), 2, 1, tmp_path)
    settings = json.loads((first / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], len(settings["target_modules"])) == (4, 8, 7)
    with safe_open(str(first / "adapter_model.safetensors"), "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert len(shapes) == 2 * 7 * shape.layers
    assert shapes["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"] == (4, 256)
    assert shapes["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"] == (64, 4)
    assert (first / "adapter_model.safetensors").read_bytes() != (second / "adapter_model.safetensors").read_bytes()
    assert not list(tmp_path.glob("**/.making-*"))


def test_an_unknown_shape_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(WorkloadInvalid, match="125m, tiny"):
        make_checkpoint("900b", 1, tmp_path)


# Profile


@pytest.mark.parametrize(
    ("operation", "group"),
    [
        ("aten::mm", "matrix products"),
        ("aten::index_select", "gather and scatter"),
        ("aten::index", "gather and scatter"),
        ("aten::mul", "elementwise and norms"),
        ("aten::multinomial", "choice of tokens"),
        ("bitsandbytes::gemm_4bit", "NF4 products"),
        ("loramux::nf4_product", "NF4 products"),
        ("loramux::low_rank", "low-rank products"),
        ("loramux::decode_attention", "attention of decode rows"),
        ("aten::to", "copies and casts"),
        ("aten::topk", "choice of tokens"),
        ("aten::t", "views and allocation"),
        ("something::else", "other"),
    ],
)
def test_operations_fall_into_groups(operation: str, group: str) -> None:
    assert find_group(operation) == group


def test_shares_are_of_the_whole_step() -> None:
    groups = with_unseen({"matrix products": 2.0, "other": 1.0}, 10.0)
    assert groups[UNSEEN] == 7.0
    assert with_unseen(groups, 5.0)[UNSEEN] == 0.0
    parts = {"forward": 9.0, "sample": 1.0}
    profile = StepProfile(4, "k=4", {"k=4": parts}, {"k=4": 3}, groups, [], parts)
    lines = report.profile_lines(profile)
    assert "| matrix products | 2.00 | 20% |" in lines
    assert f"| {UNSEEN} | 7.00 | 70% |" in lines
    assert any("the whole step is 10.00 ms here, forward 9.00" in line for line in lines)


@pytest.mark.skipif(find_native() is None, reason="no C compiler")
def test_compiled_kernels_are_marked_while_it_is_asked_for() -> None:
    kernels = find_native()
    assert kernels is not None
    prepared = kernels.prepare(2, [SlotSegment(0, 2, 0)], torch.device("cpu"))
    rank_rows = RankRows({0: (0, 8)}, 8, torch.device("cpu"))

    def run() -> Any:
        a, b = torch.zeros(1, 8, 16), [torch.zeros(8, 4)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            pools = LowRankPools(a, b, [(0, 4)], [rank_rows])
            kernels.add(torch.zeros(2, 4), torch.zeros(2, 16), pools, prepared)
        return profiler.key_averages()

    with marked_kernels():
        marked = run()
    groups, operations = group_operations(marked, 1)
    found = next(entry for entry in operations if entry.operation == "loramux::low_rank")
    assert found.shapes == "[2, 16] [1, 8, 16]"
    assert groups["low-rank products"] == found.milliseconds > 0
    assert not any(event.key.startswith("loramux::") for event in run())


def test_no_steps_give_zeros() -> None:
    assert set(median_parts([]).values()) == {0.0}
