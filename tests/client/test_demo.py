"""The demo's logic without training: mixing, the bar, accuracy and burst over a fake server, the table."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from loramux import AsyncClient
from loramux.cli.main import app
from loramux.demo import asking, report
from loramux.demo.main import Kept, choose_tasks
from loramux.demo.values import Accuracy, Ask, BurstOutcome, DemoOutcome, TaskOutcome, interleave
from loramux.terminal.failures import CommandError, ExitCode
from loramux.terminal.output import plain
from loramux_protos.v1 import adapters_pb2
from support.fake_service import FakeServer


def _outcome(base: float, adapter: float, name: str = "a") -> TaskOutcome:
    accuracy = Accuracy(200, base, adapter)
    return TaskOutcome(name, "title", "[bold]in", "You wrote: in", "out " * 20, 1.0, accuracy)


def test_neighbors_use_different_adapters() -> None:
    groups = [[Ask(name, f"{name}{i}", "") for i in range(2)] for name in "xyz"]
    mixed = interleave(groups, 8)
    assert [ask.prompt for ask in mixed] == ["x0", "y0", "z0", "x1", "y1", "z1", "x0", "y0"]
    assert all(left.adapter != right.adapter for left, right in itertools.pairwise(mixed))


@pytest.mark.parametrize(("base", "adapter", "passed"), [(0.0, 0.6, True), (0.3, 0.89, False), (0.0, 0.59, False)])
def test_the_bar_is_sixty_points(base: float, adapter: float, passed: bool) -> None:
    task = _outcome(base, adapter)
    assert task.passed is passed
    burst = BurstOutcome(64, 1, 5, 100.0, 120.0)
    assert DemoOutcome("m", (task, _outcome(0.0, 1.0)), burst, 1.0, 2.0).passed is passed


def test_the_table_shows_every_task_as_it_is() -> None:
    burst = BurstOutcome(64, 2, 5, 1000.0, 1500.0)
    outcome = DemoOutcome("m", (_outcome(0.0, 0.975), _outcome(0.5, 0.6, "weak")), burst, 10.0, 20.0)
    stream = io.StringIO()
    report.show(outcome, Console(file=stream, width=120))
    text = stream.getvalue()
    assert "[bold]in" in text  # a model's words are text, not markup
    assert "97.5 %" in text
    assert "below the bar" in text
    assert "failed: weak" in text
    assert "1,000 output tokens/s; the same prompts on the base only 1,500" in text
    assert "ratio 0.67 (medians" in text  # of the numbers that stand beside it
    assert json.loads(json.dumps(plain(outcome)))["tasks"][1]["accuracy"]["adapter"] == 0.6


def test_a_kept_server_is_told_of_whatever_becomes_of_the_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    burst = BurstOutcome(64, 1, 5, 1000.0, 1500.0)
    outcome = DemoOutcome("m", (_outcome(0.0, 0.975),), burst, 10.0, 20.0)
    kept = Kept("127.0.0.1:50099", 4242, tmp_path)
    monkeypatch.setattr("loramux.demo.main.run", lambda options, console: (outcome, kept))
    result = CliRunner().invoke(app, ["demo", "--keep", "--json", str(tmp_path / "nowhere" / "out.json")])
    assert result.exit_code == ExitCode.REFUSED
    assert "kill 4242" in result.stdout
    assert "cannot write" in result.stderr


def test_tasks_are_chosen_by_name_in_the_demos_order() -> None:
    assert len(choose_tasks(())) >= 4
    assert [task.name for task in choose_tasks(("roman", "backwards"))] == ["backwards", "roman"]
    with pytest.raises(CommandError, match="nothing"):
        choose_tasks(("nothing",))


@pytest.mark.asyncio
async def test_accuracy_counts_exact_answers_of_base_and_adapter(fake: FakeServer) -> None:
    fake.state.adapters["up"] = adapters_pb2.Adapter(name="up")
    asks = [Ask("up", "a", "up: a"), Ask("up", "b", "base: b"), Ask("up", "c", "up: c"), Ask("up", "d", "no")]
    answered = []
    async with AsyncClient(fake.address) as client:
        accuracy = await asking.measure_accuracy(client, asks, lambda: answered.append(1))
    assert (accuracy.questions, accuracy.base, accuracy.adapter) == (4, 0.25, 0.5)
    assert accuracy.gain == 0.25
    assert len(answered) == 8


@pytest.mark.asyncio
async def test_the_burst_alternates_the_same_work(fake: FakeServer) -> None:
    for name in ("x", "y"):
        fake.state.adapters[name] = adapters_pb2.Adapter(name=name)
    asks = interleave([[Ask("x", "p", "")], [Ask("y", "q", "")]], 4)
    async with AsyncClient(fake.address) as client:
        burst = await asking.measure_burst(client, asks, tokens=3, rounds=2)
    assert (burst.requests, burst.adapters, burst.rounds) == (4, 2, 2)
    assert burst.mixed_rate > 0
    assert len(fake.state.requests) == 4 * 2 * 3
    kinds = [request.cache_salt for request in fake.state.requests]
    assert len(set(kinds)) == 6
    assert all(r.stopping.ignore_eos and r.stopping.max_tokens == 3 for r in fake.state.requests)
    for request in fake.state.requests:
        assert bool(request.adapter) == request.cache_salt.endswith("mixed")
