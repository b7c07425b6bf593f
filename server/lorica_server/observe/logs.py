"""Log lines of one form, as text or JSON, on the standard library's logging.

A line is a message and fields (`extra={"fields": {...}}`); the call id of the running
call is added by itself. Knows no service.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any, TextIO

CALL_ID: ContextVar[str] = ContextVar("lorica_call_id", default="")
"""The id of the call that the current task serves; INTERNAL errors tell it to the client."""

ROOT = "lorica_server"


def configure_logs(level: str, form: str, stream: TextIO | None = None) -> logging.Logger:
    """Send `lorica_server` lines of at least `level` to `stream` (standard error); `form` is text or json."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logger = logging.getLogger(ROOT)
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
    return logger


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The record's own fields, and the call id when a call is being served."""
    fields: dict[str, Any] = dict(getattr(record, "fields", {}))
    call_id = CALL_ID.get()
    if call_id:
        fields.setdefault("call_id", call_id)
    return fields


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO message key=value ...`, a traceback below."""

    def format(self, record: logging.LogRecord) -> str:
        pairs = "".join(f" {key}={_quoted(value)}" for key, value in fields_of(record).items())
        line = f"{_stamp(record)} {record.levelname} {record.getMessage()}{pairs}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line; a traceback is the field `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def _stamp(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


def _quoted(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    plain = text.isprintable() and text and not any(sign in text for sign in ' "=')
    return text if plain else json.dumps(text)
