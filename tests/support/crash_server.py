"""A server in miniature that dies on order: `python -m support.crash_server`, orders as JSON lines on stdin.

Each order forks a child that opens the store and does its operations; the child writes "try NUMBER" before and
"ack NUMBER" after each, straight to the pipe. With `kill_at` it kills itself at that step (file operation or SQL
statement); without, the test kills it by the pid it was told. "ended <how>" closes each order.
"""

import itertools
import json
import os
import signal
import sqlite3
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux_adapters.errors import AdapterNotFound
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.store import schema
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.protocol import AdapterStore
from loramux_adapters.store.records import AdapterUpdate, Quotas
from loramux_adapters.store.spec_json import decode_spec
from support.stores import BASE, TENANT, Files, SteppedDisk, manifest_of, send

QUOTAS = Quotas(keep_versions=1, upload_ttl_seconds=1e12)  # the clock is moved far beyond the usual one
SPECS_FILE = "specs.json"
CHUNK_BYTES = 128 << 10


@dataclass(frozen=True)
class Operation:
    """One change of a store; `adapter` is one of a corpus, `number` makes an upload's id, `seconds` is clock time."""

    what: str  # publish, alias, delete, use or expire
    name: str = ""
    adapter: str = ""
    number: int = 0
    ttl: float | None = None
    max_uses: int | None = None
    alias: str = ""
    seconds: float = 0.0

    @property
    def upload_id(self) -> str:
        """Of a publish."""
        return f"upload-{self.number:06}"


@dataclass(frozen=True)
class StoredAdapter:
    """One adapter of a corpus, as a store takes it."""

    files: Files
    spec: AdapterSpec


class Clock:
    """The machine's, moved forward."""

    def __init__(self, ahead: float = 0.0) -> None:
        self.ahead = ahead

    def __call__(self) -> float:
        return time.time() + self.ahead


def load_corpus(root: Path) -> dict[str, StoredAdapter]:
    """What `corpus.write_specs` was called for."""
    specs = json.loads((root / SPECS_FILE).read_text())
    return {
        name: StoredAdapter(
            {path.name: path.read_bytes() for path in sorted((root / name).iterdir())}, decode_spec(json.dumps(spec))
        )
        for name, spec in specs.items()
    }


def perform(store: AdapterStore, corpus: dict[str, StoredAdapter], operation: Operation, clock: Clock) -> None:
    """Do it as a server would. A publish goes on where an upload of its id was cut."""
    name = operation.name
    if operation.what == "publish":
        adapter, upload_id = corpus[operation.adapter], operation.upload_id
        ends = {"ttl_seconds": operation.ttl, "max_uses": operation.max_uses}
        store.begin_upload(TENANT, upload_id, manifest_of(name, adapter.files, **ends))
        send(store, upload_id, adapter.files, chunk=CHUNK_BYTES)
        store.staged_files(TENANT, upload_id)
        store.publish(TENANT, upload_id, adapter.spec, BASE)
    elif operation.what == "alias":
        store.update(TENANT, name, AdapterUpdate(add_aliases=(operation.alias,)))
    elif operation.what == "delete":
        with suppress(AdapterNotFound):
            store.delete(TENANT, name)
    elif operation.what == "use":
        version = store.acquire(TENANT, name, counts=True)
        assert version.use is not None
        store.count_use(version.use)
        store.release(version.digest)
    else:
        clock.ahead += operation.seconds
        store.expire()


def say(line: str) -> None:
    """One write: whole or not there, and no buffer that dies with the process."""
    os.write(1, f"{line}\n".encode())


def work(
    root: Path, corpus: dict[str, StoredAdapter], operations: list[Operation], ahead: float, kill_at: int | None
) -> None:
    """One life over one directory."""
    steps = itertools.count(1)

    def step() -> None:
        if next(steps) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
        connection = schema.connect(path, busy_seconds)
        connection.set_trace_callback(lambda _: step())
        return connection

    clock = Clock(ahead)
    disk = SteppedDisk(lambda *_: step())
    with LocalStore(root, QUOTAS, disk=disk, connect=connect, clock=clock) as store:
        for number, operation in enumerate(operations):
            say(f"try {number}")
            perform(store, corpus, operation, clock)
            say(f"ack {number}")


def main() -> None:
    """Serve orders until stdin ends; the argument is the corpus."""
    corpus = load_corpus(Path(sys.argv[1]))
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        operations = [Operation(**fields) for fields in order["operations"]]
        pid = os.fork()
        if pid == 0:
            try:
                work(Path(order["root"]), corpus, operations, order["ahead"], order["kill_at"])
            except BaseException as error:
                say(f"error {type(error).__name__} {error}")
                os._exit(1)
            os._exit(0)
        say(f"pid {pid}")
        _, status = os.waitpid(pid, 0)
        say(f"ended {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
