"""kill -9 in the midst of a fleet, again and again: what comes out is bit for bit that of a run that was never stopped.

`KILL_ROUNDS` makes it longer than the suite has time for: each round kills at other moments.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loramux_trainer.export import REPORT
from loramux_trainer.job import parse_job
from support.killable_fleet import EVENTS
from support.processes import environment
from support.tiny import conversation, write_jsonl
from support.training import train_together

ROUNDS = int(os.environ.get("KILL_ROUNDS", "1"))
WEIGHTS = "adapter_model.safetensors"

JOBS: dict[str, dict[str, Any]] = {
    "adalora": {
        "method": "adalora",
        "loss": {"name": "dpo", "precompute_ref_log_probs": True},
        "lora": {"target_modules": ["q_proj", "up_proj"], "rank": 2, "alpha": 4, "dropout": 0.1},
        "adalora": {"init_r": 4, "tinit": 2, "tfinal": 2, "delta_t": 2},
        "training": {"optimizer": "lion", "max_steps": 12, "learning_rate": 1e-3},
        "data": {"train": "pairs.jsonl"},
    },
    "galore": {
        "method": "galore",
        "galore": {"rank": 2, "update_proj_gap": 3, "rank_budget": 6},
        "lora": {"target_modules": ["v_proj", "down_proj"]},
        "training": {
            "optimizer": "sophia",
            "hessian_update_period": 3,
            "max_steps": 10,
            "learning_rate": 0.1,
            "eval_steps": 5,
        },
        "data": {"train": "chats.jsonl", "eval_fraction": 0.2},
    },
    "pissa": {
        "init": "pissa",
        "loss": "kto",
        "lora": {"target_modules": ["o_proj", "lm_head"], "rank": 3, "dropout": 0.2, "rank_budget": 4},
        "training": {
            "optimizer": "muon",
            "max_steps": 8,
            "gradient_accumulation_steps": 2,
            "lr_scheduler_type": "warmup_stable_decay",
        },
        "data": {"train": "labeled.jsonl"},
    },
}
"""Methods, losses and optimizers that have states of their own between steps."""


def _write_data(root: Path) -> None:
    texts = [(f"word{i * 7 % 40}", f"drow{i}{'!' * (i % 9)}") for i in range(20)]
    write_jsonl(root / "chats.jsonl", [{"messages": conversation(*pair)} for pair in texts])
    pairs = [{"prompt": a, "chosen": b, "rejected": b[::-1] + "?"} for a, b in texts]
    write_jsonl(root / "pairs.jsonl", pairs)
    labeled = [{"prompt": a, "completion": b, "label": i % 2 == 0} for i, (a, b) in enumerate(texts)]
    write_jsonl(root / "labeled.jsonl", labeled)


def _values(root: Path, output: str) -> list[dict[str, Any]]:
    return [
        {
            **job,
            "model": "loramux-tiny",
            "name": name,
            "output": str(root / output / name),
            "data": {**job["data"], "train": str(root / job["data"]["train"])},
            "training": {"batch_size": 3, "seed": seed, "deterministic": True, **job["training"]},
            "checkpoint": {"save_steps": 2, "save_total_limit": 1},
        }
        for seed, (name, job) in enumerate(JOBS.items())
    ]


class KillableFleet:
    """A process that forks a run for each order."""

    def __init__(self, jobs: list[dict[str, Any]], root: Path) -> None:
        (root / "jobs.json").write_text(json.dumps(jobs))
        with (root / "errors.txt").open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.killable_fleet", str(root / "jobs.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                bufsize=1,
                env=environment(),
            )
        self._read("here")

    def run(self, order: str, kill_after: float | None = None) -> tuple[int, int]:
        """Exit code and number of steps that were taken. `kill_after`: seconds from the first of them."""
        assert self._process.stdin
        self._process.stdin.write(f"{order}\n")
        pid, steps = int(self._read("pid").split()[1]), 0
        while not (line := self._read("")).startswith("ended"):
            steps += 1
            if steps == 1 and kill_after is not None:
                time.sleep(kill_after)
                os.kill(pid, signal.SIGKILL)
        return int(line.split()[1]), steps

    def close(self) -> None:
        """Ends it; a run that is under way ends by itself."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def _read(self, begins: str) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "it is gone"
        assert line.startswith(begins)
        return line.strip()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fleet's outputs, of a run that was never stopped."""
    root = tmp_path_factory.mktemp("whole")
    _write_data(root)
    outcome = train_together([parse_job(values) for values in _values(root, "outputs")])
    assert not outcome.failures
    return root / "outputs"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_fleet_that_is_killed_and_resumed_ends_with_the_bits_of_one_that_was_not(
    whole: Path, tmp_path: Path, seed: int
) -> None:
    _write_data(tmp_path)
    draw = random.Random(seed)
    fleet = KillableFleet(_values(tmp_path, "outputs"), tmp_path)
    killed: list[str] = []
    try:
        during = [f"{kind} {draw.randint(1, 4)}" for kind in EVENTS[:-1]]
        for order in draw.sample(during, len(during)):
            if fleet.run(order)[0] == -signal.SIGKILL:
                killed.append(order.rpartition(" ")[0])
        if fleet.run("none 0", kill_after=draw.uniform(0, 0.5))[0] == -signal.SIGKILL:
            killed.append("any moment")
        for _ in range(2):  # an adapter has three files, of which the last makes it one
            if fleet.run(f"{EVENTS[-1]} {draw.randint(1, 3)}")[0] == -signal.SIGKILL:
                killed.append(EVENTS[-1])
        code, _ = fleet.run("none 0")
        assert code == 0, (tmp_path / "errors.txt").read_text()
    finally:
        fleet.close()
    assert set(killed) >= {EVENTS[0], EVENTS[1]}, killed
    for name in JOBS:
        ours, theirs = tmp_path / "outputs" / name, whole / name
        assert (ours / WEIGHTS).read_bytes() == (theirs / WEIGHTS).read_bytes(), (name, killed)
        reports = [json.loads((each / REPORT).read_text()) for each in (ours, theirs)]
        for key in ("history", "evals", "data"):
            assert reports[0][key] == reports[1][key], (name, key, killed)
        assert _names(ours) == _names(theirs), (name, killed)


def _names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))
