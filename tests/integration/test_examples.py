"""Scripts that users of transformers, peft and trl write, as they are, against a running server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from loramux import Client
from loramux.local_server import LocalServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("trl") is None, reason="trl, which the scripts are for, is not installed"),
]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LOG_PROB_BOUND = 1e-3
"""In float32 both compute the same products of the same four bits and factors, in another order of sums."""


def _run(script: str, server: LocalServer, tmp_path: Path) -> str:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), server.address],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in here for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize(
    ("script", "name", "prompt", "says"),
    [
        ("transformers_trainer.py", "example-trainer", "shout candle:", "CANDLE"),
        ("trl_sft.py", "example-sft", "shout candle: ", "CANDLE"),
        ("trl_dpo.py", "example-dpo", "shout candle: ", None),
        ("trl_kto.py", "example-kto", "shout candle: ", None),
    ],
)
def test_its_adapter_is_served(
    script: str, name: str, prompt: str, says: str | None, server: LocalServer, client: Client, tmp_path: Path
) -> None:
    base = client.generate(prompt, temperature=0.0, max_tokens=12).text
    _run(script, server, tmp_path)
    text = client.generate(prompt, adapter=name, temperature=0.0, max_tokens=12).text
    client.delete(name)
    assert text != base
    if says is not None:
        assert text.strip() == says


def test_grpo_samples_from_the_version_that_it_trains(server: LocalServer, client: Client, tmp_path: Path) -> None:
    said = _run("trl_grpo.py", server, tmp_path)
    steps = re.findall(r"step (\d+): example-grpo@(\w+), log-probabilities differ by at most (\S+)", said)
    assert len(steps) == 4
    assert len({digest for _, digest, _ in steps}) == len(steps)
    assert max(float(difference) for _, _, difference in steps) < LOG_PROB_BOUND
    assert re.search(r"first token of the new version: \d+ ms", said)
    last = client.adapter("example-grpo").digest
    client.delete("example-grpo")
    assert not any(last.startswith(digest) for _, digest, _ in steps)
