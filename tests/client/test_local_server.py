"""A server of our own is surely ended: stopped while it starts, before it starts, by a terminal that closes."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path

import psutil
import pytest

from loramux.bench import grpc_driver
from loramux.errors import Unavailable
from loramux.local_server import LocalServer
from loramux.terminal.signals import terminated_as_interrupted


def test_a_server_that_is_stopped_while_it_starts_ends(tmp_path: Path) -> None:
    server = LocalServer({"data_dir": str(tmp_path / "data")}, log=tmp_path / "log")
    failures: list[Exception] = []

    def start() -> None:
        try:
            server.__enter__()
        except Unavailable as error:
            failures.append(error)

    before = set(psutil.Process().children())
    thread = threading.Thread(target=start)
    thread.start()
    try:
        while not (children := set(psutil.Process().children()) - before):
            thread.join(0.01)
        server.stop()
        thread.join(30)
        assert not thread.is_alive()
    finally:
        server.stop()
    assert len(failures) == 1
    assert not any(child.is_running() for child in children)


def test_a_server_that_was_stopped_does_not_start(tmp_path: Path) -> None:
    server = LocalServer({"data_dir": str(tmp_path / "data")}, log=tmp_path / "log")
    server.stop()
    try:
        with pytest.raises(Unavailable, match="stopped before it started"):
            server.__enter__()
    finally:
        server.stop()
    assert not (tmp_path / "data").exists()


@pytest.mark.asyncio
async def test_a_bench_that_is_stopped_while_its_server_starts_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, stopped = threading.Event(), threading.Event()

    class Slow(LocalServer):
        def __enter__(self) -> Slow:
            entered.set()
            stopped.wait(30)
            return self

        def stop(self, *, drain_seconds: float = 15.0) -> None:
            stopped.set()

    monkeypatch.setattr(grpc_driver, "LocalServer", Slow)
    driver = grpc_driver.GrpcDriver([], address=None, options={}, scratch=tmp_path)
    starting = asyncio.create_task(driver.start())
    await asyncio.to_thread(entered.wait, 30)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await driver.close()
    assert stopped.is_set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_unwinds_like_ctrl_c(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def closed_twice() -> None:
        with terminated_as_interrupted():
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(signal.SIGHUP)  # a terminal that closes may say so twice: not heard any more

    with pytest.raises(KeyboardInterrupt):
        closed_twice()
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_in_a_loop_the_main_task_is_cancelled_where_it_waits(number: signal.Signals) -> None:
    """And no exception is raised out of the code that the signal finds, which may be compiled."""
    seen: list[str] = []

    async def main() -> None:
        try:
            signal.raise_signal(number)
            seen.append("went on")
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    with terminated_as_interrupted(), pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert seen == ["went on", "cancelled"]


def test_nohup_stays() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminated_as_interrupted():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
