"""What a push sends: the files of an adapter directory, an id that a later attempt finds again, the messages.

Reads files and counts bytes; knows no channel and does not check what is in the files (see `adapter_directory`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux import fields
from loramux.adapter_directory import CONFIG, HUB_INTERFACE, HUB_WEIGHTS, WEIGHTS, find_head, hint, remark
from loramux.errors import LocalFilesError, LoramuxError, NotFound, OutOfRange
from loramux.types import FileEntry, FileProgress, ProgressCallback, TransferProgress
from loramux_protos.v1 import adapters_pb2

_DECLARATIONS = ("loramux.json", "lorica.json")  # the second as the project was called before
_INITIAL = "initial_adapter_model.safetensors"  # what PiSSA and its like subtracted from the base
_TEXT = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # where they are other than the base's
_CERTIFICATE = "loramux_certificate.json"
FILES = (CONFIG, WEIGHTS, _INITIAL, HUB_WEIGHTS, HUB_INTERFACE, *_DECLARATIONS, _CERTIFICATE, *_TEXT)
"""Every file that an adapter may have; its config and one of the weights it has."""
CHUNK_BYTES = 512 * 1024  # the server takes at most 1 MiB


@dataclass(frozen=True)
class Bundle:
    """One adapter directory as it will be sent. `upload_id` follows from everything else, so a repeat resumes."""

    name: str
    directory: Path
    files: tuple[FileEntry, ...]
    left_out: tuple[str, ...]
    labels: Mapping[str, str]
    allow_base_mismatch: bool
    options: Mapping[str, Any]  # ttl_seconds, max_uses and if_version, where given
    upload_id: str
    remark: str  # what its owner should know of the adapter, or nothing

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)


def collect(
    directory: Path,
    name: str,
    labels: Mapping[str, str],
    *,
    allow_base_mismatch: bool,
    ttl: float | None = None,
    max_uses: int | None = None,
    if_version: str | None = None,
    tokenizer: bool = True,
) -> Bundle:
    """Read and hash what a push of `directory` sends; without `tokenizer` its texts are left to the base's.

    Raises LocalFilesError when it holds no adapter, InvalidArgument when one of the others is out of range.
    """
    options = fields.upload_options(ttl, max_uses, if_version)
    if not directory.is_dir():
        raise LocalFilesError(f"{directory} is not a directory; give the directory that save_pretrained wrote")
    try:
        present = {path.name for path in directory.iterdir()}
        is_hub = HUB_WEIGHTS in present and WEIGHTS not in present
        missing = [file for file in (CONFIG, HUB_WEIGHTS if is_hub else WEIGHTS) if file not in present]
        if missing:
            raise LocalFilesError(f"{directory} holds no {' and no '.join(missing)}; {hint(directory, present)}")
        if is_hub and (head := find_head(present)):
            raise LocalFilesError(
                f"{directory} holds a prediction head ({head}), which no upload carries: where it was not trained "
                "along, save the adapter again with with_head=False, or remove the head's files"
            )
        left_out: tuple[str, ...] = (WEIGHTS,) if is_hub else (HUB_WEIGHTS, HUB_INTERFACE)
        left_out += () if tokenizer else _TEXT
        sending = [file for file in FILES if file in present and file not in left_out]
        files = tuple(_entry(directory / file) for file in sending)
        remarked = "" if is_hub else remark(directory)
    except OSError as error:
        raise LocalFilesError(f"cannot read {error.filename}: {error.strerror}") from error
    return Bundle(
        name,
        directory,
        files,
        tuple(sorted(present - set(sending))),
        labels,
        allow_base_mismatch,
        options,
        _upload_id(name, files, labels, allow_base_mismatch, options),
        remarked,
    )


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(path.name, file.tell(), sha256)


def _upload_id(
    name: str,
    files: tuple[FileEntry, ...],
    labels: Mapping[str, str],
    allow_base_mismatch: bool,
    options: Mapping[str, Any],
) -> str:
    content: list[object] = [name, [[f.file, f.size, f.sha256] for f in files], sorted(labels.items())]
    content += [allow_base_mismatch, *([sorted(options.items())] if options else [])]
    return "push-" + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:40]


def held_bytes(bundle: Bundle, progress: tuple[FileProgress, ...]) -> dict[str, int]:
    """Bytes per file that the server holds from an earlier attempt."""
    names = {entry.file for entry in bundle.files}
    return {entry.file: entry.received for entry in progress if entry.file in names}


def messages(
    bundle: Bundle, held: Mapping[str, int], report: ProgressCallback | None
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    """Begin, the bytes that the server does not hold yet, commit. Reads one chunk at a time."""
    yield adapters_pb2.UploadAdapterRequest(
        begin=adapters_pb2.UploadBegin(
            upload_id=bundle.upload_id,
            name=bundle.name,
            manifest=[adapters_pb2.FileEntry(file=f.file, size=f.size, sha256=f.sha256) for f in bundle.files],
            labels=bundle.labels,
            allow_base_mismatch=bundle.allow_base_mismatch,
            **bundle.options,
        )
    )
    done = sum(held.values())
    for entry in bundle.files:
        for chunk in _chunks(bundle.directory / entry.file, held.get(entry.file, 0)):
            yield adapters_pb2.UploadAdapterRequest(chunk=chunk)
            done += len(chunk.data)
            if report is not None:
                report(TransferProgress(entry.file, done, bundle.total))
    yield adapters_pb2.UploadAdapterRequest(commit=adapters_pb2.UploadCommit())


def _chunks(path: Path, offset: int) -> Iterator[adapters_pb2.UploadChunk]:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while data := file.read(CHUNK_BYTES):
                yield adapters_pb2.UploadChunk(file=path.name, offset=offset, data=data)
                offset += len(data)
    except OSError as error:
        raise LocalFilesError(f"cannot read {path}: {error.strerror}") from error


def has_moved(error: LoramuxError) -> bool:
    """Whether another attempt moved the upload meanwhile: go on from what the server then holds."""
    return isinstance(error, OutOfRange | NotFound)
