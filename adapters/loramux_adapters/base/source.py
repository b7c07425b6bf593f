"""Where a base comes from: the embedded one, a checkpoint directory, or a hub id within reach.

What serve, train and doctor say of a base that cannot be had or loaded is said here, once for all of them. Torch-free.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from loramux_adapters.base.files import check_base_files
from loramux_adapters.embedded.tiny import TINY_NAME, tiny_path
from loramux_adapters.errors import BaseInvalid

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHOICES = f"give a checkpoint directory, a hub id like org/name, or {TINY_NAME}"


def find_base(model: str, environ: Mapping[str, str], *, revision: str | None = None) -> Path | None:
    """The directory that holds the base's files, None for a hub id whose files are still to be fetched.

    Raises BaseInvalid for what can be no base, or cannot be had: its message is a sentence about `model`.
    """
    if model == TINY_NAME:
        return tiny_path()
    path = Path(os.path.expanduser(model))  # Path.expanduser raises where there is no such user
    if path.is_dir():
        _check_files(path, f"{model} cannot be loaded")
        return path
    if path.exists():
        raise BaseInvalid(
            f"{model} is a file, not a directory",
            remedy="give the directory of a Hugging Face checkpoint: config.json, safetensors and tokenizer.json "
            "(single files, GGUF among them, are not read)",
        )
    if not _HUB_ID.fullmatch(model):
        close = f"did you mean {TINY_NAME}? Otherwise " if difflib.get_close_matches(model, [TINY_NAME]) else ""
        raise BaseInvalid(f"there is no directory {model}, and it is not a hub id", remedy=close + _CHOICES)
    return _find_cached(model, environ, revision)


def explain_load(model: str, error: Exception, environ: Mapping[str, str]) -> BaseInvalid:
    """What `error`, which a load of `model` by transformers ended with, says to the person who gave `model`."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    if model == TINY_NAME or Path(os.path.expanduser(model)).is_dir():
        return BaseInvalid(f"{model} cannot be loaded: {reason}", remedy="give another checkpoint directory")
    if _is_offline(environ):
        return _not_cached(model) if _is_absent(error) else _not_loaded(model, reason)
    names = {type(cause).__name__ for cause in _causes(error)}
    if "GatedRepoError" in names:
        return BaseInvalid(
            f"{model} is gated on the hub",
            remedy="ask for access on its page there and set HF_TOKEN, or give a checkpoint directory",
        )
    if "RepositoryNotFoundError" in names:
        return BaseInvalid(
            f"there is no directory {model}, and the hub has no such model (or it is private)",
            remedy="check its name, set HF_TOKEN for a private one, or give a checkpoint directory",
        )
    if "RevisionNotFoundError" in names:
        return BaseInvalid(f"the hub's {model} has no such revision", remedy="give one that its page lists")
    if names & {"LocalEntryNotFoundError", "ConnectionError", "ConnectError", "OfflineModeIsEnabled"}:
        return BaseInvalid(
            f"there is no directory {model}, and the hub cannot be reached for it",
            remedy="check the network, or give a checkpoint directory; HF_HUB_OFFLINE=1 takes a model that was "
            "downloaded before from the local cache without asking",
        )
    return _not_loaded(model, reason)


def _not_loaded(model: str, reason: str) -> BaseInvalid:
    return BaseInvalid(f"{model} cannot be loaded: {reason}", remedy=_CHOICES)


def _check_files(directory: Path, said: str) -> None:
    try:
        check_base_files(directory)
    except BaseInvalid as error:
        raise BaseInvalid(f"{said}: {error}", remedy=error.remedy) from error


def _find_cached(model: str, environ: Mapping[str, str], revision: str | None) -> Path | None:
    snapshot = _snapshot(_hub_folder(model, environ), revision or "main")
    if not _is_offline(environ):
        # Half a snapshot is no mistake: the load fetches the rest.
        try:
            return None if snapshot is None else _checked(snapshot)
        except BaseInvalid:
            return None
    if snapshot is None:
        raise _not_cached(model)
    _check_files(snapshot, f"{model} cannot be loaded from the local cache")
    return snapshot


def _checked(directory: Path) -> Path:
    check_base_files(directory)
    return directory


def _not_cached(model: str) -> BaseInvalid:
    return BaseInvalid(
        f"{model} is not in the local cache and HF_HUB_OFFLINE is set",
        remedy="unset HF_HUB_OFFLINE once to download it, or give a checkpoint directory",
    )


def _snapshot(folder: Path, revision: str) -> Path | None:
    """The cached files of a revision, a commit or a name whose commit huggingface_hub noted."""
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    for _ in range(16):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_absent(error: Exception) -> bool:
    """By name: the hub's library is imported only where it raised."""
    absent = {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}
    return any(type(cause).__name__ in absent for cause in _causes(error))


def _is_offline(environ: Mapping[str, str]) -> bool:
    return environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def _hub_folder(model: str, environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub caches `model`: its documented environment variables, in its order."""
    home = environ.get("HF_HOME") or os.path.join(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(cache).expanduser() / ("models--" + model.replace("/", "--"))
