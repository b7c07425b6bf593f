"""Adapters as plain bytes for the store's tests, and disks that fail or stop at a chosen step."""

import hashlib
import sqlite3
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from loramux_adapters.spec import AdapterSpec
from loramux_adapters.store import schema
from loramux_adapters.store.disk import Disk
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.protocol import AdapterStore
from loramux_adapters.store.records import FileEntry, Published, Quotas, UploadManifest

TENANT = "default"
CONFIG = "adapter_config.json"
MODEL = "adapter_model.safetensors"
BASE, OTHER_BASE = "b" * 64, "c" * 64

Files = Mapping[str, bytes]


def content(seed: str, size: int = 5000) -> dict[str, bytes]:
    """Two files that depend on `seed` alone; the store does not look inside."""
    repeats = size // 32 + 1
    model = b"".join(hashlib.sha256(f"{seed}/{index}".encode()).digest() for index in range(repeats))[:size]
    return {CONFIG: f'{{"seed": "{seed}"}}'.encode(), MODEL: model}


def digest_of(files: Files) -> str:
    """A digest in the manner of the real one: of the weights, not of what is written around them."""
    return hashlib.sha256(b"test" + files[MODEL]).hexdigest()


def spec_of(files: Files, *, base_mismatch: bool = False) -> AdapterSpec:
    """A spec whose digest is `digest_of(files)`."""
    return AdapterSpec(
        digest=digest_of(files),
        kind="lora",
        base_fingerprint=None,
        base_mismatch=base_mismatch,
        ranks={"layers.0.q_proj": 8, "layers.0.v_proj": 4},
        biases=frozenset({"layers.0.v_proj"}),
        nbytes=len(files[MODEL]),
    )


@dataclass(frozen=True)
class FakeWeights:
    """Facts only."""

    spec: AdapterSpec
    nbytes: int = 1


def read_facts(files: Mapping[str, Path], *, allow_base_mismatch: bool) -> FakeWeights:
    """What a format reader does, as far as the registry can see."""
    found = {file: path.read_bytes() for file, path in files.items()}
    return FakeWeights(spec_of(found, base_mismatch=allow_base_mismatch))


def entries_of(files: Files) -> tuple[FileEntry, ...]:
    return tuple(FileEntry(file, len(data), hashlib.sha256(data).hexdigest()) for file, data in files.items())


def manifest_of(name: str, files: Files, **options: object) -> UploadManifest:
    return UploadManifest(name=name, files=entries_of(files), **options)  # type: ignore[arg-type]


def new_id() -> str:
    return uuid.uuid4().hex


def send(store: AdapterStore, upload_id: str, files: Files, *, tenant: str = TENANT, chunk: int = 2048) -> None:
    """Send what is still missing of an open upload."""
    for progress in store.query_upload(tenant, upload_id).files:
        data = files[progress.file]
        for offset in range(progress.received, len(data), chunk):
            store.write_chunk(tenant, upload_id, progress.file, offset, data[offset : offset + chunk])


def stage(store: AdapterStore, name: str, files: Files, *, tenant: str = TENANT, **options: object) -> str:
    """Bring an upload to the point where only its publish is missing; returns its id."""
    upload_id = new_id()
    store.begin_upload(tenant, upload_id, manifest_of(name, files, **options))
    send(store, upload_id, files, tenant=tenant)
    store.staged_files(tenant, upload_id)
    return upload_id


def put(
    store: AdapterStore, name: str, files: Files, *, tenant: str = TENANT, base: str = BASE, **options: object
) -> Published:
    """A whole upload."""
    return store.publish(tenant, stage(store, name, files, tenant=tenant, **options), spec_of(files), base)


def stored(store: AdapterStore, digest: str) -> dict[str, bytes]:
    """A version's bytes, integrity checked."""
    return {file: path.read_bytes() for file, path in store.files(digest).items()}


def blob_files(root: Path) -> set[str]:
    """Names of everything below the blobs' directory."""
    return {path.name for path in (root / "blobs").glob("*/*")}


class QuickDisk(Disk):
    """Waits for no disk: for tests that neither lose power nor watch the order of operations."""

    def sync(self, path: Path) -> None:
        assert path.exists()


def _quick_connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
    connection = schema.connect(path, busy_seconds)
    connection.execute("PRAGMA synchronous = OFF")
    return connection


def quick_store(root: Path, quotas: Quotas | None = None, *, clock: Callable[[], float] = time.time) -> LocalStore:
    """A store that is as fast as memory."""
    return LocalStore(root, quotas, disk=QuickDisk(), connect=_quick_connect, clock=clock)


class SteppedDisk(Disk):
    """Calls `step(operation, path)` before every operation that changes something, and in mid-write."""

    def __init__(self, step: Callable[[str, Path], None]) -> None:
        self._step = step

    def make_directory(self, path: Path) -> None:
        self._step("make_directory", path)
        super().make_directory(path)

    def write_at(self, path: Path, offset: int, data: bytes) -> None:
        half = len(data) // 2
        self._step("write", path)
        super().write_at(path, offset, data[:half])
        self._step("write_rest", path)
        super().write_at(path, offset + half, data[half:])

    def allocate(self, path: Path, size: int) -> None:
        self._step("allocate", path)
        super().allocate(path, size)

    def truncate(self, path: Path, size: int) -> None:
        self._step("truncate", path)
        super().truncate(path, size)

    def sync(self, path: Path) -> None:
        self._step("sync", path)
        super().sync(path)

    def link(self, source: Path, target: Path) -> None:
        self._step("link", target)
        super().link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", target)
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        self._step("remove", path)
        super().remove(path)

    def remove_tree(self, path: Path) -> None:
        self._step("remove_tree", path)
        super().remove_tree(path)

    def open(self, path: Path) -> BinaryIO:
        self._step("open", path)
        return super().open(path)


class Fault:
    """Raises `error` at every operation named in `operations` while it is armed."""

    def __init__(self) -> None:
        self.operations: frozenset[str] = frozenset()
        self.error = 0

    def arm(self, error: int, *operations: str) -> None:
        self.error, self.operations = error, frozenset(operations)

    def clear(self) -> None:
        self.operations = frozenset()

    def __call__(self, operation: str, path: Path) -> None:
        if operation in self.operations:
            raise OSError(self.error, "injected", str(path))


class FaultyConnection(sqlite3.Connection):
    """Fails statements that start with `statement` with SQLite's result code `code`."""

    statement = ""
    code = sqlite3.SQLITE_FULL

    def execute(self, sql: str, parameters: object = (), /) -> sqlite3.Cursor:  # type: ignore[override]
        if self.statement and sql.lstrip().startswith(self.statement):
            error = sqlite3.OperationalError("injected")
            error.sqlite_errorcode = self.code
            raise error
        return super().execute(sql, parameters)  # type: ignore[arg-type]
