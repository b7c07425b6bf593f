"""`loramux serve` by a fork of a process that has imported what it imports: 4 s of processor time each, not 14.

`python -m support.prepared` serves orders on its stdin, a Unix socket: JSON with arguments and environment, and the
file for what the server prints. It answers with the process id, and with the exit code once there is one.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

from support.processes import environment

_SERVE = ["-m", "loramux.cli.main", "serve"]
_LARGEST = 1 << 20  # bytes of an order


class Preparation:
    """The prepared process, in the process of the tests. A context manager; begins at the first `start`."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._answered = threading.Condition(self._lock)
        self._pids: list[int] = []
        self._codes: dict[int, int] = {}

    def start(self, arguments: Sequence[str], environ: Mapping[str, str], output: IO[bytes]) -> Prepared:
        """As subprocess.Popen would, with stdout and stderr in `output`, in a session of its own."""
        with self._lock:
            if self._socket is None:
                self._socket = self._begin()
            order = json.dumps({"arguments": list(arguments), "environ": dict(environ)}).encode()
            socket.send_fds(self._socket, [order], [output.fileno()])
            self._answered.wait_for(lambda: bool(self._pids))
            return Prepared(self, self._pids.pop())

    def code(self, pid: int, timeout: float | None) -> int | None:
        """The exit code of a process; None where there is none within `timeout` seconds."""
        with self._lock:
            self._answered.wait_for(lambda: pid in self._codes, timeout)
            return self._codes.get(pid)

    def close(self) -> None:
        """Ends the prepared process; what it has started is on its own."""
        with self._lock:
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    def _begin(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "support.prepared"], stdin=theirs, env=environment(), start_new_session=True
            )
        threading.Thread(target=self._listen, args=(ours, process), daemon=True).start()
        return ours

    def _listen(self, ours: socket.socket, process: subprocess.Popen[bytes]) -> None:
        with ours, process:
            while answer := ours.recv(_LARGEST):
                pid, code = json.loads(answer)
                with self._lock:
                    if code is None:
                        self._pids.append(pid)
                    else:
                        self._codes[pid] = code
                    self._answered.notify_all()


class Prepared:
    """What of subprocess.Popen a LocalServer uses."""

    def __init__(self, preparation: Preparation, pid: int) -> None:
        self._preparation, self.pid = preparation, pid

    @property
    def returncode(self) -> int | None:
        """See subprocess.Popen."""
        return self._preparation.code(self.pid, 0)

    def poll(self) -> int | None:
        """See subprocess.Popen."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """See subprocess.Popen."""
        code = self._preparation.code(self.pid, timeout)
        if code is None:
            raise subprocess.TimeoutExpired(_SERVE, timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """See subprocess.Popen."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """See subprocess.Popen."""
        self.send_signal(signal.SIGKILL)


class PreparedPopen:
    """In place of the module `subprocess` for who starts servers, and nothing else."""

    DEVNULL, STDOUT, TimeoutExpired = subprocess.DEVNULL, subprocess.STDOUT, subprocess.TimeoutExpired

    def __init__(self, preparation: Preparation) -> None:
        self._preparation = preparation

    def Popen(self, command: Sequence[str], **options: Any) -> Any:  # noqa: N802
        """See subprocess.Popen."""
        at = next((at for at in range(len(command)) if list(command[at : at + len(_SERVE)]) == _SERVE), None)
        if at is None:
            raise AssertionError(f"no server that could be prepared: {command}")
        return self._preparation.start(command[at + len(_SERVE) - 1 :], options["env"], options["stdout"])


def main() -> None:
    """Imports, then forks for each order until stdin ends. Has no threads, which a fork would lose."""
    orders = socket.socket(fileno=0)
    _import_server()
    running: dict[int, int] = {}  # a file that is ready when the process has ended -> its id
    while True:
        ready, _, _ = select.select([orders, *running], [], [])
        for ended in ready:
            if ended is not orders:
                pid = running.pop(ended)
                os.close(ended)
                _, status = os.waitpid(pid, 0)
                orders.send(json.dumps([pid, os.waitstatus_to_exitcode(status)]).encode())
        if orders in ready:
            order, files, _, _ = socket.recv_fds(orders, _LARGEST, 1)
            if not order:
                return
            (output,) = files
            pid = os.fork()
            if pid == 0:
                _serve(**json.loads(order), output=output)
            os.close(output)
            running[os.pidfd_open(pid)] = pid
            orders.send(json.dumps([pid, None]).encode())


def _import_server() -> None:
    from loramux_adapters.threads import limit_spinning

    limit_spinning()  # as the command does, before torch comes
    for module in ("loramux.cli.main", "loramux_server.app", "loramux_server.assembly"):
        importlib.import_module(module)


def _serve(arguments: Sequence[str], environ: Mapping[str, str], output: int) -> None:
    """In the child. Never returns."""
    code = 70
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.environ.update({"GOMP_SPINCOUNT": os.environ["GOMP_SPINCOUNT"], **environ})
        for name in os.environ.keys() - environ.keys() - {"GOMP_SPINCOUNT"}:
            del os.environ[name]
        from loramux.cli.main import app

        sys.argv = ["loramux", *arguments]
        app(list(arguments))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
