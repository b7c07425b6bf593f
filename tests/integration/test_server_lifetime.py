"""Starts and stops of the real process, and uploads across them."""

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

from loramux import Client, local_server
from loramux.errors import InvalidArgument, LoramuxError, Unavailable
from loramux.local_server import LocalServer, free_ports
from loramux.retry import NO_RETRY
from loramux.terminal.failures import ExitCode
from support.live import until

OPTIONS = {"dtype": "float32", "kv_bytes": "64MiB", "readiness_seconds": "0.2", "drain_seconds": "20"}


@pytest.fixture(autouse=True)
def _whole_processes(prepared_servers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As users start them, here where it is about starts and ends."""
    monkeypatch.setattr(local_server, "subprocess", subprocess)


def _serve(*flags: str) -> tuple[int, str, float]:
    """Exit code, output and CPU seconds of a `loramux serve` that ends by itself."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "loramux.cli.main", "serve", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return done.returncode, done.stdout + done.stderr, used


def test_a_start_that_cannot_succeed_says_why_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        data = ["--data-dir", str(tmp_path / "data"), "--metrics-listen", "none"]
        for flags, what, remedy in (
            ([f"--listen=127.0.0.1:{port}", *data], "cannot listen", "--listen"),
            (["--model", str(tmp_path / "absent"), "--listen=127.0.0.1:0", *data], "no directory", "loramux-tiny"),
            (["--max-running", "0", *data], "at least 1", "raise"),
            (["--device", "cuda:77", "--listen=127.0.0.1:0", *data], "cuda:77", "cuda:0" if _gpus() else "--device"),
        ):
            code, output, seconds = _serve(*flags)
            assert code == ExitCode.USAGE
            assert what in output
            assert remedy in output
            assert "Traceback" not in output
            assert seconds < 2.0, flags  # of CPU: importing torch alone takes more


def _gpus() -> bool:
    return Path("/dev/nvidia0").exists()


def test_a_small_server_from_its_start_to_its_drain(tmp_path: Path) -> None:
    port, metrics = free_ports(2)
    address = f"127.0.0.1:{port}"
    options = {**OPTIONS, "kv_bytes": "2MiB", "data_dir": str(tmp_path / "data"), "listen": address}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "loramux.cli.main", "serve", f"--metrics-listen=127.0.0.1:{metrics}", *flags]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        statuses = health_pb2.HealthCheckResponse
        assert _watch_health(address) == [statuses.NOT_SERVING, statuses.SERVING]
        with Client(address, retry=NO_RETRY) as client:
            _check_what_cannot_fit(client)
            stream = client.stream("x", max_tokens=800, temperature=0.0, ignore_eos=True)
            parts = [next(stream)]
            process.send_signal(signal.SIGTERM)
            until(lambda: not client.is_healthy(), "health says NOT_SERVING")
            client.generate("x", max_tokens=1)  # balancers may not have heard of it: the readiness period
            until(lambda: _refuses(client), "new work is refused")
            parts += list(stream)
            assert parts[-1].finish is not None
            assert parts[-1].finish.usage.completion == 800
        assert process.wait(60) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()


def test_the_process_ends_without_the_interpreters_own_end() -> None:
    """Which takes over a second with torch in it, and would wait for a base that is still being loaded."""
    code = (
        "import atexit, threading, time\nfrom loramux_server.app import _leave\n"
        "atexit.register(print, 'the interpreter ended')\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\nprint('said')\n_leave(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200)
    assert (done.returncode, done.stdout) == (3, "said\n")


def _check_what_cannot_fit(client: Client) -> None:
    """Row 9, the last case: more than the whole KV pool, and less than the context."""
    limits = client.model().limits
    assert limits.kv_cache_tokens + 1 < limits.context_tokens
    for options in ({"token_ids": [5] * (limits.kv_cache_tokens + 1)}, {"token_ids": [5], "max_tokens": 1200}):
        with pytest.raises(InvalidArgument) as caught:
            client.generate(**options)  # type: ignore[arg-type]
        assert caught.value.metadata["kv_cache_tokens"] == str(limits.kv_cache_tokens)


def _refuses(client: Client) -> bool:
    try:
        client.generate("x", max_tokens=1)
    except Unavailable as error:
        return error.reason == "DRAINING" and error.retry_after is not None
    return False


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


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    server = LocalServer({**OPTIONS, "data_dir": str(tmp_path / "data")}, log=tmp_path / "log")
    with server, Client(server.address, retry=NO_RETRY) as client:
        stream = client.stream("x", max_tokens=2000, temperature=0.0, ignore_eos=True)
        next(stream)
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(0.5)
        os.kill(server.pid, signal.SIGTERM)
        with pytest.raises(LoramuxError):
            for _ in stream:
                pass
        assert _exit_code(server.pid) == 128 + signal.SIGTERM


def test_an_upload_resumes_after_client_and_server_were_killed(tmp_path: Path, adapter_dirs: dict[str, Path]) -> None:
    directory = adapter_dirs["large"]
    options = {**OPTIONS, "data_dir": str(tmp_path / "data")}
    pusher = (
        "import os, sys, signal, time; from loramux import Client, upload\n"
        "upload.CHUNK_BYTES = 16384\n"
        "def stop(progress):\n"
        "    if progress.done < 100000: return\n"
        "    time.sleep(0.3)  # for what was sent to arrive\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Client(sys.argv[1]).push(sys.argv[2], 'large', progress=stop)\n"
    )
    with LocalServer(options, log=tmp_path / "log-1") as server, Client(server.address) as client:
        done = subprocess.run([sys.executable, "-c", pusher, server.address, str(directory)], timeout=60, check=False)
        assert done.returncode == -signal.SIGKILL
        assert list(client.adapters()) == []
        os.kill(server.pid, signal.SIGKILL)
    brief = {**options, "drain_seconds": "0.5"}
    with LocalServer(brief, log=tmp_path / "log-2") as server, Client(server.address) as client:
        assert list(client.adapters()) == []
        first = client.push(directory, "large")
        again = client.push(directory, "large")
        assert first.resumed_bytes > 0
        assert (first.created, again.created) == (True, False)
        assert client.verify("large").digest == first.adapter.digest == again.adapter.digest
        _check_a_stream_longer_than_the_grace(server, client)


def _check_a_stream_longer_than_the_grace(server: LocalServer, client: Client) -> None:
    """Row 42: it is told, and the server leaves in order."""
    stream = client.stream("x", adapter="large", max_tokens=2000, temperature=0.0, ignore_eos=True)
    next(stream)
    os.kill(server.pid, signal.SIGTERM)
    *_, last = stream
    assert last.finish is not None
    assert last.finish.reason == "aborted"
    assert 0 < last.finish.usage.completion < 2000
    assert _exit_code(server.pid) == 0


def _exit_code(pid: int) -> int:
    """Of a child that ends by itself, which is left for its owner to reap."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    return ended.si_status
