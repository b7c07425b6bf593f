"""Exit codes, and how an expected failure is shown: what, why and what to do, in place of a traceback.

Looks only at error families whose package is already imported, so that showing an error loads nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import IntEnum
from types import ModuleType


class ExitCode(IntEnum):
    """What the process returns to its caller; documented in docs/configuration.md."""

    OK = 0
    NO = 1  # it ran, and the answer is no: not healthy, a bar missed, a difference found
    USAGE = 2  # it cannot begin as it was called: flags, environment, configuration, base, device, what is in use
    REFUSED = 3  # a request, an adapter, a job or its data is wrong, or the state forbids it
    NOT_FOUND = 4
    UNAVAILABLE = 5  # no server, an overloaded one, or a timeout: trying again may help
    FAULT = 6  # the server or the transfer is at fault
    INTERRUPTED = 130


@dataclass(frozen=True)
class Failure:
    """An expected failure in words."""

    message: str
    code: ExitCode
    remedy: str = ""


class CommandError(Exception):
    """A command's own refusal."""

    def __init__(self, message: str, *, remedy: str = "", code: ExitCode = ExitCode.REFUSED) -> None:
        super().__init__(message)
        self.failure = Failure(message, code, remedy)


_OF_EXTRAS = frozenset({
    "accelerate", "bitsandbytes", "grpc_reflection", "jinja2", "numpy", "prometheus_client", "psutil", "regex",
    "safetensors", "tokenizers", "torch", "transformers",
})  # fmt: skip
_EXTRA_OF_PACKAGE = {"loramux.bench": "bench", "loramux.demo": "serve,train", "loramux_trainer": "train"}


def install_hint(extra: str) -> str:
    """How to install what an extra brings."""
    return f"install the extra `{extra}` from a clone of the project: pip install '.[{extra}]'"


def explain(error: BaseException) -> Failure | None:
    """The failure in words, or None when `error` is a bug and deserves its traceback."""
    if isinstance(error, CommandError):
        return error.failure
    if isinstance(error, KeyboardInterrupt):
        return Failure("interrupted", ExitCode.INTERRUPTED)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _OF_EXTRAS:
        extra = next((extra for package, extra in _EXTRA_OF_PACKAGE.items() if _loaded(package)), "serve")
        return Failure(f"this command needs {error.name}", ExitCode.USAGE, install_hint(extra))
    return _client(error) or _server(error) or _adapters(error) or _trainer(error)


def _loaded(name: str) -> ModuleType | None:
    return sys.modules.get(name)


def _client(error: BaseException) -> Failure | None:
    errors = _loaded("loramux.errors")
    if errors is None or not isinstance(error, errors.LoramuxError):
        return None
    code = ExitCode.FAULT
    if isinstance(error, errors.NotFound):
        code = ExitCode.NOT_FOUND
    elif isinstance(error, errors.Unavailable | errors.ResourceExhausted | errors.DeadlineExceeded):
        code = ExitCode.UNAVAILABLE
    elif isinstance(
        error,
        errors.InvalidArgument | errors.FailedPrecondition | errors.AlreadyExists | errors.LocalFilesError
        | errors.Aborted | errors.PermissionDenied | errors.Unauthenticated,
    ):  # fmt: skip
        code = ExitCode.REFUSED
    if error.reason == "ADAPTER_NOT_FOUND":
        remedy = "see `loramux adapters ls`"
    else:
        remedy = f"try again in {error.retry_after:g} s" if error.retry_after else ""
    return Failure(str(error), code, remedy)


def _server(error: BaseException) -> Failure | None:
    errors = _loaded("loramux_server.errors")
    if errors is None or not isinstance(error, errors.StartError):
        return None
    return Failure(str(error), ExitCode.USAGE, error.remedy)


def _adapters(error: BaseException) -> Failure | None:
    errors = _loaded("loramux_adapters.errors")
    if errors is None or not isinstance(error, errors.AdapterError):
        return None
    return Failure(error.message, ExitCode.REFUSED, error.remedy)


def _trainer(error: BaseException) -> Failure | None:
    errors = _loaded("loramux_trainer.errors")
    if errors is None or not isinstance(error, errors.TrainerError):
        return None
    start = errors.ModelInvalid | errors.DeviceInvalid  # what `serve` refuses to start with
    if isinstance(error, errors.SeveralInvalid):
        usage = any(isinstance(problem, start) for problem in error.problems)
        return Failure(str(error), ExitCode.USAGE if usage else ExitCode.REFUSED)
    code = ExitCode.USAGE if isinstance(error, start) else ExitCode.REFUSED
    if isinstance(error, errors.Interrupted):
        code = ExitCode.INTERRUPTED
    return Failure(str(error), code, getattr(error, "remedy", ""))
