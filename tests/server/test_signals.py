"""What signals do to the serving process: the real `serve` over the fake inside, without torch."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loramux import Client
from loramux.local_server import free_ports

_SCRIPT = """
import functools, signal, sys
from pathlib import Path
import loramux_server.app as app
from loramux_server.errors import StartError
from support.servers import Inside, serve_config
if "nohup" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
def fail(config, hooks, lock):
    raise StartError("no base", remedy="")
app.App = functools.partial(app.App, build=fail if "fails" in sys.argv else Inside().build)
try:
    app.serve(serve_config(Path(sys.argv[1]), listen=sys.argv[2], metrics_listen="none"))
except StartError:
    sys.exit(2)
"""


def _start(tmp_path: Path, address: str, *arguments: str) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parents[1])
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {tests!r})\n{_SCRIPT}",
            str(tmp_path),
            address,
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def _serving(tmp_path: Path, *arguments: str, listen: str = "") -> Iterator[tuple[subprocess.Popen[str], str]]:
    address = listen or f"127.0.0.1:{free_ports(1)[0]}"
    process = _start(tmp_path, address, *arguments)
    try:
        with Client(address) as client:
            client.wait_healthy(60)
        yield process, address
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_drains(tmp_path: Path, number: signal.Signals) -> None:
    with _serving(tmp_path) as (process, address):
        with Client(address) as client:
            stream = client.stream("Hello", max_tokens=60, temperature=0.0, ignore_eos=True)
            parts = [next(stream)]
            process.send_signal(number)
            process.send_signal(signal.SIGHUP)  # as a terminal's shell and the kernel may both do
            parts += stream
        assert parts[-1].finish is not None
        assert parts[-1].finish.usage.completion == 60
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "draining requests=" in output
        assert re.search(r" drained finished=[01] cut_off=0 seconds=", output)  # it may have ended before the drain


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_behind_a_closed_terminals_is_the_first(tmp_path: Path, number: signal.Signals) -> None:
    with _serving(tmp_path) as (process, address):
        with Client(address) as client:
            stream = client.stream("Hello", max_tokens=60, temperature=0.0, ignore_eos=True)
            parts = [next(stream)]
            process.send_signal(signal.SIGHUP)
            assert process.stdout is not None
            while "draining" not in (line := process.stdout.readline()):
                assert line
            process.send_signal(number)
            parts += stream
        assert parts[-1].finish is not None
        process.communicate(timeout=30)
        assert process.returncode == 0


def test_a_unix_socket_goes_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with _serving(tmp_path / "data", listen=f"unix:{path}") as (process, _):
        assert path.is_socket()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 0
    assert not path.exists()


def test_nohup_keeps_it_running(tmp_path: Path) -> None:
    with _serving(tmp_path, "nohup") as (process, address):
        process.send_signal(signal.SIGHUP)
        with Client(address) as client:
            assert client.generate("Hello", max_tokens=2).choices
            assert client.is_healthy()
        assert process.poll() is None


def test_a_start_that_fails_after_listening_ends_without_a_traceback(tmp_path: Path) -> None:
    output, _ = (process := _start(tmp_path, "127.0.0.1:0", "fails")).communicate(timeout=60)
    assert process.returncode == 2
    assert "loading" in output
    assert "Traceback" not in output
    assert "never awaited" not in output
