"""Every shipped workload, on the tiny shape and a few tokens, by the engine itself; and the kinds of its adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loramux.bench import main
from loramux.bench.kinds import BOTTLENECK, KINDS, make_members
from loramux.bench.main import BenchOptions
from loramux.bench.shapes import make_checkpoint
from loramux.bench.workload import LORA, Scenario, Workload, WorkloadInvalid, read_workload, shipped
from loramux_adapters.adapter_files import MAX_FILE_BYTES
from loramux_adapters.base.load import load_base
from loramux_adapters.formats import registry as formats
from loramux_adapters.formats.limits import ReadLimits

SHAPE, SLOTS = "tiny", 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _shrunk(workload: Workload) -> Workload:
    """The same mix, smaller: what is left of it is all that differs from scenario to scenario."""

    def fewer(distinct: int) -> int:
        return distinct * SLOTS // workload.slots if workload.slots else min(distinct, 20)

    return replace(
        workload,
        shape=SHAPE,
        requests=min(workload.requests, 20),
        at_once=min(workload.at_once, 6),
        prompt_tokens=12,
        output_tokens=3,
        output_spread=min(workload.output_spread, 1),
        rounds=1,
        warmup=0,
        settle=min(workload.settle, 8),
        slots=min(workload.slots, SLOTS),
        scenarios=tuple(
            replace(each, distinct=fewer(each.distinct), beside=min(each.beside, 12)) for each in workload.scenarios
        ),
    )


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_workload_runs(name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = _shrunk(read_workload(name))
    monkeypatch.setattr(main, "read_workload", lambda _: workload)
    options = BenchOptions(name, ("engine",), threads=1, dtype="float32", cache=cache, out=tmp_path)
    results = main.run(options, lambda message: None)
    summary = {entry["scenario"]: entry for entry in results.values["summary"]}
    assert list(summary) == [scenario.name for scenario in workload.scenarios]
    assert summary[workload.scenarios[0].name]["ratio"] == 1.0
    assert all(entry["rate"] > 0 and entry["processor_ratio"] > 0 for entry in summary.values())
    assert f"| engine | {workload.scenarios[-1].name} |" in results.page
    if name == "loading-125m":
        assert summary["alone"]["loads"] == 0
    if name == "slots-125m":
        assert summary["1x"]["loads"] <= SLOTS < summary["10x"]["loads"]
        assert "4 of them fit on the device" in results.page


def test_a_kept_store_is_found_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = replace(
        _shrunk(read_workload("registered-125m")), seed=3, requests=2, settle=0, scenarios=(Scenario("two", 2),)
    )
    monkeypatch.setattr(main, "read_workload", lambda _: workload)
    options = BenchOptions("registered-125m", ("engine",), threads=1, dtype="float32", cache=cache, out=tmp_path)
    main.run(options, lambda message: None)
    (store,) = cache.glob("*-seed3-*-store")
    blobs = {path: path.stat().st_mtime_ns for path in (store / "blobs").rglob("*") if path.is_file()}
    assert len(blobs) >= 2
    main.run(options, lambda message: None)
    assert {path: path.stat().st_mtime_ns for path in (store / "blobs").rglob("*") if path.is_file()} == blobs


# The part that makes each kind what it is, on a shape so small that a dense weight is cheaper than some ranks.
PARTS = {
    LORA: "LowRank", "dora": "Magnitude", "alora": "LowRank", "tokens": "TokenRows", "head": "Dense",
    "loha": "Dense", "lokr": "Dense", "hra": "LowRank", "vera": "LowRank", "ia3": "OutputGain", "norms": "NormWeight",
    "prompt": "VirtualTokens", "prefix": "KvPrefix", "oft": "Dense", BOTTLENECK: "Bottleneck",
}  # fmt: skip


def test_one_adapter_of_each_kind_is_read_as_that_kind(cache: Path) -> None:
    kinds = (LORA, *KINDS, BOTTLENECK)
    assert set(read_workload("kinds-125m").scenarios[1].kinds) == set(kinds) == set(PARTS)
    checkpoint = make_checkpoint(SHAPE, 1, cache)
    scenario = Scenario("kinds", len(kinds), kinds=kinds)
    workload = replace(_shrunk(read_workload("kinds-125m")), scenarios=(scenario,))
    base = load_base(str(checkpoint), compute_dtype=torch.float32).spec
    found = {}
    for kind, path in zip(kinds, make_members(workload, checkpoint, cache), strict=True):
        files = {file.name: file for file in path.iterdir() if file.name in MAX_FILE_BYTES}
        weights = formats.read(files, base, ReadLimits())
        found[kind] = {type(part).__name__ for module in weights.modules.values() for part in module.parts}
        assert bool(weights.spec.invocation) == (kind == "alora")
    assert {kind: PARTS[kind] in parts for kind, parts in found.items()} == dict.fromkeys(kinds, True), found


def test_an_unknown_kind_lists_the_known(cache: Path) -> None:
    workload = replace(read_workload("mixed-tiny"), scenarios=(Scenario("x", 1, kinds=("lola",)),))
    with pytest.raises(WorkloadInvalid, match="no 'lola'; known are lora, dora"):
        make_members(workload, cache, cache)
