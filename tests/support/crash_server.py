"""A server in miniature that dies on order: `python -m support.crash_server`, orders as JSON lines on stdin.

Each order forks a child that opens the store and works; the child writes "try ..." before and "ack ..."
after each operation, straight to the pipe. With `kill_at` it kills itself at that step (file operation or
SQL statement); without, the test kills it by the pid it was told. "ended <how>" closes each order.
"""

import itertools
import json
import os
import signal
import sqlite3
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from loramux_adapters.errors import AdapterNotFound
from loramux_adapters.store import schema
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.records import Quotas
from support.stores import BASE, TENANT, SteppedDisk, content, manifest_of, send, spec_of

NAMES = ("a", "b", "c")
QUOTAS = Quotas(keep_versions=1)


def files_of(number: int) -> dict[str, bytes]:
    """What operation `number` publishes; every second of them shares its config with others."""
    files = content(f"v{number}", 3000)
    return {**files, "adapter_config.json": b"{}"} if number % 2 else files


def upload_id_of(number: int) -> str:
    return f"upload-{number:06}"


def say(line: str) -> None:
    """One write: whole or not there, and no buffer that dies with the process."""
    os.write(1, f"{line}\n".encode())


def work(root: Path, first: int, rounds: int, delete_every: int, kill_at: int | None) -> None:
    """Publish over three names in turn, after every so many deleting the next one."""
    steps = itertools.count(1)

    def step() -> None:
        if next(steps) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
        connection = schema.connect(path, busy_seconds)
        connection.set_trace_callback(lambda _: step())
        return connection

    with LocalStore(root, QUOTAS, disk=SteppedDisk(lambda *_: step()), connect=connect) as store:
        for number in range(first, first + rounds):
            name = NAMES[number % len(NAMES)]
            files = files_of(number)
            say(f"try publish {name} {number}")
            store.begin_upload(TENANT, upload_id_of(number), manifest_of(name, files))
            send(store, upload_id_of(number), files, chunk=1000)
            store.staged_files(TENANT, upload_id_of(number))
            store.publish(TENANT, upload_id_of(number), spec_of(files), BASE)
            say(f"ack publish {name} {number}")
            if number % delete_every == 0:
                other = NAMES[(number + 1) % len(NAMES)]
                say(f"try delete {other} {number}")
                with suppress(AdapterNotFound):
                    store.delete(TENANT, other)
                say(f"ack delete {other} {number}")


def main() -> None:
    """Serve orders until stdin ends."""
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                work(**{**order, "root": Path(order["root"])})
            except BaseException as error:
                say(f"error {type(error).__name__} {error}")
                os._exit(1)
            os._exit(0)
        say(f"pid {pid}")
        _, status = os.waitpid(pid, 0)
        say(f"ended {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
