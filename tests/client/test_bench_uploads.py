"""The bench of uploads: what is pushed, what is measured from when, and the stages in between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loramux.bench.engine_driver import EngineDriver
from loramux.bench.shapes import get_shape, make_adapter, make_checkpoint
from loramux.bench.stages import StageClock
from loramux.bench.uploads import (
    FILE,
    NAME,
    UploadPlan,
    UploadSample,
    measure_uploads,
    summarize_uploads,
    upload_lines,
    write_version,
)
from loramux.bench.workload import AdapterPlan
from support.scripted_driver import ScriptedDriver

SHAPE = "tiny"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(SHAPE, AdapterPlan(rank=2), 0, 1, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_versions_differ_from_each_other_and_from_the_first(dtype: str, tmp_path: Path) -> None:
    first = make_adapter(SHAPE, AdapterPlan(rank=2, dtype=dtype), 0, 1, tmp_path)
    files = [(write_version(first, tmp_path / "new", number) / FILE).read_bytes() for number in range(100)]
    assert len({*files, (first / FILE).read_bytes()}) == 101
    old, new = load_file(first / FILE), load_file(tmp_path / "new" / FILE)
    changed = [name for name in old if not old[name].equal(new[name])]
    assert len(changed) == 1
    assert (old[changed[0]] != new[changed[0]]).sum() <= 8
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.asyncio
async def test_every_push_is_new_and_times_count_from_its_last_byte(adapter: Path, tmp_path: Path) -> None:
    driver = ScriptedDriver()
    plan = UploadPlan(pushes=3, seconds=0.0, streams=(0, 2), rounds=2, prompt_tokens=4)
    samples = await measure_uploads(plan, [driver], adapter, 100, tmp_path, lambda message: None)
    assert [(s.round_number, s.streams) for s in samples] == [(1, 0), (1, 2), (2, 2), (2, 0)]
    assert {name for name, _ in driver.pushes} == {NAME}
    assert len({data for _, data in driver.pushes}) == 3 * 2 * 3
    # The first round is forgotten. Pushes begin at tens, take 2 s to send and 1 to acknowledge; tokens come at 1 ms.
    first = samples[0]
    assert first.transfer == (2.0,) * 3
    assert first.acknowledged == (1.0,) * 3
    assert first.first_token == tuple(0.001 - (10.0 * number + 2.0) for number in (7, 8, 9))
    assert first.stages == {"load": (1.75, 2.0, 2.25)}
    beside = [sent for salt, sent in driver.runs if salt == "1/2"]
    assert beside
    assert all(call.adapter is None for sent in beside for call in sent)
    assert not [salt for salt, _ in driver.runs if salt == "1/0"]


def _sample(
    driver: str, streams: int, number: int, first: tuple[float, ...], **stages: tuple[float, ...]
) -> UploadSample:
    return UploadSample(driver, streams, number, (0.5,) * len(first), (0.05,) * len(first), first, stages)


def test_ratios_are_of_medians_of_one_round() -> None:
    samples = [
        _sample("grpc", 0, 1, (0.1, 0.2, 0.3)),
        _sample("grpc", 8, 1, (0.2, 0.3, 0.9)),
        _sample("grpc", 0, 2, (1.0, 2.0, 3.0)),
        _sample("grpc", 8, 2, (2.0, 3.0, 4.0)),
    ]
    idle, busy = summarize_uploads(samples)
    assert (idle.streams, idle.ratio, idle.pushes, idle.rounds) == (0, 1.0, 6, 2)
    assert (busy.streams, busy.ratio) == (8, pytest.approx(1.5))
    assert (busy.first_token_p50, busy.first_token_p99) == (0.9, 4.0)
    assert upload_lines([idle, busy])[3] == "| grpc | 8 | 6 | 500.0 | 50.0 / 50.0 | 900.0 / 4000.0 | 1.50 |"
    assert len(upload_lines([idle, busy])) == 4


def test_stages_have_a_table_of_their_own() -> None:
    lines = upload_lines(summarize_uploads([_sample("engine", 0, 1, (0.1,), cast=(0.004,), load=(0.02,))]))
    assert lines[-3:] == [
        "|---|---:|",
        "| cast | 4.0 / 4.0 |",
        "| load | 20.0 / 20.0 |",
    ]


@pytest.mark.asyncio
async def test_the_stages_of_a_real_push_are_all_the_time_there_is(adapter: Path, tmp_path: Path) -> None:
    model = make_checkpoint(SHAPE, 1, tmp_path)
    clock = StageClock()
    settings = {"model": str(model), "threads": "1", "dtype": "float32", "kv_bytes": "8MiB"}
    driver = EngineDriver([], options=settings, scratch=tmp_path / "store", stages=clock)
    plan = UploadPlan(pushes=2, seconds=0.0, streams=(0, 1), rounds=1, prompt_tokens=4)
    with clock.running():
        await driver.start()
        try:
            samples = await measure_uploads(
                plan, [driver], adapter, get_shape(SHAPE).vocabulary, tmp_path / "versions", lambda message: None
            )
        finally:
            await driver.close()
    assert len(samples) == 2
    for sample in samples:
        assert all(seconds > 0 for stage in sample.stages.values() for seconds in stage)
        together = [sum(stage[push] for stage in sample.stages.values()) for push in range(2)]
        assert together == pytest.approx(sample.first_token)
