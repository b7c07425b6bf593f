"""The command line against a real server in a process of its own: an adapter's whole life, and the small bench."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from loramux.cli.main import app
from loramux.local_server import LocalServer, free_ports
from loramux.terminal.failures import ExitCode
from loramux_adapters.embedded.tiny import tiny_path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    directory = tmp_path_factory.mktemp("server")
    options = {"data_dir": str(directory / "data"), "dtype": "float32", "drain_seconds": "2", "readiness_seconds": "0"}
    with LocalServer(options, log=directory / "log") as running:
        yield running


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA on every q_proj of the embedded base, strong enough to change what it says."""
    base = json.loads((tiny_path() / "config.json").read_text())
    width, layers = base["hidden_size"], base["num_hidden_layers"]
    head = base.get("head_dim") or width // base["num_attention_heads"]
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(layers):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, width, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(head * base["num_attention_heads"], 4, generator=generator)
    directory = tmp_path / "noisy"
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        )
    )
    return directory


def test_an_adapters_life(server: LocalServer, adapter: Path, tmp_path: Path) -> None:
    def loramux(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--address", server.address])

    def generate(*arguments: str) -> str:
        result = loramux("generate", "--chat", "-t", "0", "-m", "12", "lantern", *arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert loramux("health").exit_code == 0
    plain = generate()
    missing = loramux("generate", "x", "--adapter", "noisy")
    assert missing.exit_code == ExitCode.NOT_FOUND

    pushed = loramux("adapters", "push", str(adapter), "--json")
    assert pushed.exit_code == 0, pushed.output
    assert json.loads(pushed.stdout)["created"] is True
    with_adapter = generate("--adapter", "noisy")
    assert with_adapter != plain
    assert generate() == plain

    assert loramux("adapters", "alias", "noisy", "prod").exit_code == 0
    assert generate("--adapter", "prod") == with_adapter
    listed = json.loads(loramux("adapters", "ls", "--json").stdout)
    assert [(entry["name"], entry["aliases"], entry["max_rank"]) for entry in listed] == [("noisy", ["prod"], 4)]

    merged = loramux("adapters", "merge", "noisy")
    assert "merged weights ready" in merged.stdout, merged.output
    assert generate("--adapter", "noisy") == with_adapter
    assert "merged weights none" in loramux("adapters", "merge", "noisy", "--off").stdout

    assert loramux("adapters", "verify", "noisy", "--against", str(adapter)).exit_code == 0
    assert loramux("adapters", "pull", "prod", str(tmp_path / "back")).exit_code == 0
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (adapter / file).read_bytes()

    assert loramux("adapters", "rm", "noisy").exit_code == 0
    assert loramux("generate", "x", "--adapter", "prod").exit_code == ExitCode.NOT_FOUND


def test_a_refused_adapter_says_why(server: LocalServer, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    result = CliRunner().invoke(app, ["adapters", "push", str(adapter), "--address", server.address])
    assert result.exit_code == ExitCode.REFUSED
    assert "q_proj" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_small_bench_measures_engine_server_and_peer(tmp_path: Path) -> None:
    drivers = ["--driver", "engine", "--driver", "grpc", "--driver", "peft"]
    result = CliRunner().invoke(
        app,
        ["bench", "-w", "mixed-tiny", *drivers, "--rounds", "1", "--threads", "1", "--dtype", "float32", "--json",
         "--profile-step", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "results")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    found = {(entry["driver"], entry["scenario"]) for entry in values["summary"]}
    assert found == {(driver, scenario) for driver in ("engine", "grpc", "peft") for scenario in ("base", "k=1", "k=4")}
    assert all(entry["rate"] > 0 for entry in values["summary"])
    assert values["profile"]["parts"]["k=4"]["forward"] > 0
    assert "matrix products" in values["profile"]["groups"]
    [page] = (tmp_path / "results").glob("*.md")
    assert "One decode step" in page.read_text()


@pytest.mark.slow
def test_a_terminated_bench_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    arguments = ["-w", "mixed-tiny", "--driver", "grpc", "--driver", "peft", "--rounds", "100000", "--threads", "1"]
    bench = subprocess.Popen(
        [sys.executable, "-m", "loramux.cli.main", "bench", *arguments, "--cache", str(tmp_path / "cache")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
    )
    said = []
    if bench.stderr is not None:
        for line in bench.stderr:
            said.append(line)
            if "warm-up: peft" in line:
                break
    assert "warm-up: peft" in said[-1], said
    children = psutil.Process(bench.pid).children(recursive=True)
    assert len(children) >= 2
    bench.send_signal(signal.SIGTERM)
    bench.communicate(timeout=60)
    assert bench.returncode == ExitCode.INTERRUPTED
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert not list(tmp_path.glob("loramux-bench-*"))


def test_generate_may_be_started_before_its_server_listens(tmp_path: Path) -> None:
    """As in `loramux serve & loramux generate "..."`, the worst way round."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    loramux = [sys.executable, "-m", "loramux.cli.main"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LORAMUX_")}
    ask = [*loramux, "generate", "--chat", "green river", "-t", "0", "-m", "16", "-a", address, "--wait", "240"]
    serve = [*loramux, "serve", f"--listen={address}", "--metrics-listen=none", f"--data-dir={tmp_path}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environ}
    with subprocess.Popen(ask, **pipes) as asking:
        try:
            assert asking.stderr.readline() == f"no server is listening at {address} yet; waiting up to 240 s for it\n"
            with subprocess.Popen(serve, stdout=subprocess.DEVNULL, env=environ) as serving:
                try:
                    text, _ = asking.communicate(timeout=240)
                finally:
                    serving.terminate()
        finally:
            asking.kill()
    assert asking.returncode == 0
    assert text.startswith("You wrote:")
