"""The demo for real, shortened: what it says, what it writes, and that nothing of it stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loramux import Client, errors
from loramux.retry import NO_RETRY
from loramux.terminal.failures import ExitCode

pytestmark = pytest.mark.slow


HASTY = """
import dataclasses, sys
import loramux.demo.main as demo
from loramux.cli.main import app
from loramux_trainer.planning.short_job import few_steps

whole = demo.demo_job

def hasty(task, directory):
    job = whole(task, directory)
    return dataclasses.replace(job, training=few_steps(job, 2))

demo.demo_job = hasty
app(sys.argv[1:])
"""
"""The demo with two steps of training, where what it learns does not matter."""


def start_demo(tmp_path: Path, *arguments: str, hasty: bool = False) -> subprocess.Popen[str]:
    program = ["-c", HASTY] if hasty else ["-m", "loramux.cli.main"]
    return subprocess.Popen(
        [sys.executable, *program, "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
    )


def is_reachable(address: str) -> bool:
    with Client(address, retry=NO_RETRY) as client:
        try:
            client.model()
        except errors.Unavailable:
            return False
        return True


def test_one_task_from_training_to_table(tmp_path: Path) -> None:
    demo = start_demo(tmp_path, "--task", "capitals", "--questions", "40", "--json", str(tmp_path / "outcome.json"))
    stdout, stderr = demo.communicate(timeout=240)
    assert demo.returncode == 0, stderr
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["passed"] is True
    [task] = outcome["tasks"]
    assert (task["name"], task["adapter_says"]) == ("capitals", "LANTERN")
    assert task["accuracy"]["questions"] == 40
    assert task["accuracy"]["adapter"] - task["accuracy"]["base"] >= 0.6
    assert outcome["burst"]["mixed_rate"] > 0
    assert "LANTERN" in stdout
    assert "passed: every adapter" in stdout
    address = stdout.partition("serving at ")[2].split()[0]
    assert not is_reachable(address)
    assert not list(tmp_path.glob("loramux-demo-*"))


def test_terminated_while_serving_it_takes_everything_with_it(tmp_path: Path) -> None:
    demo = start_demo(tmp_path, "--task", "capitals", "--questions", "2000", hasty=True)
    address = ""
    if demo.stdout is not None:
        for line in demo.stdout:
            if line.startswith("serving at "):
                address = line.split()[-1]
                break
    assert address, demo.communicate(timeout=60)
    assert is_reachable(address)
    demo.send_signal(signal.SIGTERM)
    demo.communicate(timeout=60)
    assert demo.returncode == ExitCode.INTERRUPTED
    deadline = time.monotonic() + 60
    while is_reachable(address) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_reachable(address)
    assert not list(tmp_path.glob("loramux-demo-*"))
