"""Starts and stops of the real process: rows 24, 26, 42, 43 and 44 of the fault list."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorica import Client
from lorica.errors import LoricaError
from lorica.local_server import LocalServer, free_ports
from lorica.retry import NO_RETRY

OPTIONS = {"dtype": "float32", "kv_bytes": "64MiB", "readiness_seconds": "0.2", "drain_seconds": "20"}


def _serve(*flags: str) -> tuple[int, str, float]:
    """Exit code, output and CPU seconds of a `lorica serve` that ends by itself."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "lorica.cli.main", "serve", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return done.returncode, done.stdout + done.stderr, used


def test_row_43_a_start_that_cannot_succeed_says_why_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        data = ["--data-dir", str(tmp_path / "data"), "--metrics-listen", "none"]
        for flags, what, remedy in (
            ([f"--listen=127.0.0.1:{port}", *data], "cannot listen", "--listen"),
            (["--model", str(tmp_path / "absent"), "--listen=127.0.0.1:0", *data], "no directory", "lorica-tiny"),
            (["--max-running", "0", *data], "at least 1", "raise"),
            (["--device", "cuda:77", "--listen=127.0.0.1:0", *data], "cuda:77", "cuda:0" if _gpus() else "--device"),
        ):
            code, output, seconds = _serve(*flags)
            assert code != 0
            assert what in output
            assert remedy in output
            assert "Traceback" not in output
            assert seconds < 2.0, flags  # of CPU: importing torch alone takes more


def _gpus() -> bool:
    return Path("/dev/nvidia0").exists()


def test_row_44_not_serving_until_warm_and_row_42_a_drain(tmp_path: Path) -> None:
    port, metrics = free_ports(2)
    options = {**OPTIONS, "data_dir": str(tmp_path / "data"), "listen": f"127.0.0.1:{port}"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "lorica.cli.main", "serve", f"--metrics-listen=127.0.0.1:{metrics}", *flags]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        seen = _watch_health(f"127.0.0.1:{port}")
        statuses = health_pb2.HealthCheckResponse
        assert seen == [statuses.NOT_SERVING, statuses.SERVING]
        with Client(f"127.0.0.1:{port}", retry=NO_RETRY) as client:
            stream = client.stream("x", max_tokens=400, temperature=0.0, ignore_eos=True)
            parts = [next(stream)]
            process.send_signal(signal.SIGTERM)
            parts += list(stream)
            assert parts[-1].finish is not None
            assert parts[-1].finish.usage.completion == 400
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def _watch_health(address: str, seconds: float = 120.0) -> list[int]:
    """The statuses in order, without repeats, until SERVING."""
    seen: list[int] = []
    deadline = time.monotonic() + seconds
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < deadline and health_pb2.HealthCheckResponse.SERVING not in seen:
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=2, wait_for_ready=True)
            except grpc.RpcError:
                continue
            if answer.status not in seen:
                seen.append(answer.status)
            time.sleep(0.02)
    return seen


def test_row_42_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    server = LocalServer({**OPTIONS, "data_dir": str(tmp_path / "data")}, log=tmp_path / "log")
    with server, Client(server.address, retry=NO_RETRY) as client:
        stream = client.stream("x", max_tokens=2000, temperature=0.0, ignore_eos=True)
        next(stream)
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(0.5)
        os.kill(server.pid, signal.SIGTERM)
        begun = time.monotonic()
        with pytest.raises(LoricaError):
            for _ in stream:
                pass
        assert time.monotonic() - begun < 5.0


def test_row_24_26_an_upload_survives_the_death_of_client_and_server(
    tmp_path: Path, adapter_dirs: dict[str, Path]
) -> None:
    directory = adapter_dirs["large"]
    options = {**OPTIONS, "data_dir": str(tmp_path / "data")}
    pusher = (
        "import os, sys, signal; from lorica import Client\n"
        "def stop(progress):\n"
        "    if progress.done > 20000: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Client(sys.argv[1]).push(sys.argv[2], 'large', progress=stop)\n"
    )
    with LocalServer(options, log=tmp_path / "log-1") as server, Client(server.address) as client:
        done = subprocess.run([sys.executable, "-c", pusher, server.address, str(directory)], timeout=60, check=False)
        assert done.returncode == -signal.SIGKILL
        assert list(client.adapters()) == []
        os.kill(server.pid, signal.SIGKILL)
    with LocalServer(options, log=tmp_path / "log-2") as server, Client(server.address) as client:
        assert list(client.adapters()) == []
        first = client.push(directory, "large")
        again = client.push(directory, "large")
        assert (first.created, again.created) == (True, False)
        assert client.verify("large").digest == first.adapter.digest == again.adapter.digest
