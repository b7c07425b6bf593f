"""A server of our own: started as a process on free ports, waited for, and surely ended.

For the demo and the bench; to serve for real, run `loramux serve`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from loramux.client import Client
from loramux.errors import LoramuxError, Unavailable
from loramux.retry import NO_RETRY


class LocalServer:
    """`loramux serve` with `options` (names as in the configuration) in a process of its own.

    Its output goes to `log`. Leaving the `with` drains and ends it, unless `keep` was called. `stop` may come from
    another thread at any time, a start that has not ended included.
    """

    def __init__(self, options: Mapping[str, str], *, log: Path, start_seconds: float = 120.0) -> None:
        self._options = dict(options)
        self._log = log
        self._start_seconds = start_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._lock = threading.Lock()  # over the two above
        self.address = ""
        self.metrics_address = ""

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process.pid

    def __enter__(self) -> Self:
        grpc_port, metrics_port = free_ports(2)
        self.address, self.metrics_address = f"127.0.0.1:{grpc_port}", f"127.0.0.1:{metrics_port}"
        options = {**self._options, "listen": self.address, "metrics_listen": self.metrics_address}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        # Options of the caller's own server (LORAMUX_*, a configuration file) must not leak into this one.
        environ = {name: value for name, value in os.environ.items() if not name.startswith("LORAMUX_")}
        with self._log.open("wb") as log, self._lock:
            if self._stopped:
                raise Unavailable("the server was stopped before it started")
            self._process = process = subprocess.Popen(
                [sys.executable, "-P", "-m", "loramux.cli.main", "serve", *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,  # a Ctrl-C is ours to handle, and a kept server outlives the terminal
            )
        try:
            self._wait(process)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def keep(self) -> None:
        """Let the server run on after the `with`."""
        self._process = None

    def stop(self, *, drain_seconds: float = 15.0) -> None:
        """SIGTERM, then SIGKILL to what is left; returns when the process is gone."""
        with self._lock:
            self._stopped = True
            process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(drain_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._start_seconds
        with Client(self.address, retry=NO_RETRY) as client:
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    raise Unavailable(f"the server ended with {process.returncode} at its start:\n{self.last_lines()}")
                with contextlib.suppress(LoramuxError):
                    if client.is_healthy(timeout=1.0):
                        return
                time.sleep(0.1)
        raise Unavailable(f"the server was not healthy after {self._start_seconds:g} s:\n{self.last_lines()}")

    def last_lines(self, count: int = 15) -> str:
        """The end of the server's log."""
        with contextlib.suppress(OSError):
            return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])
        return ""


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that were free a moment ago; all held at once, so they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in sockets]
