"""Log lines of one form, as text or JSON, on the standard library's logging.

A line is a message and fields (`extra={"fields": {...}}`). Lines written while a call is served also have the call's
id and what was noted of it: the caller's ids, the adapter, token counts. Knows no service.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO

CALL_ID: ContextVar[str] = ContextVar("loramux_call_id", default="")
"""The id of the call that the current task serves; INTERNAL errors give it to the client."""

_NOTED: ContextVar[dict[str, Any] | None] = ContextVar("loramux_call_noted", default=None)

ROOTS = ("loramux_server", "loramux_adapters")
"""The packages whose lines are a server's own: what the store says of lost or damaged adapters too."""
DIGITS = 12
"""Hex digits of a digest in logs and metrics, as the command line shows them; 8 are enough for NAME@DIGEST."""

_MOST_NOTED = 256  # characters: notes hold what callers wrote, unchecked


def configure_logs(level: str, form: str, stream: TextIO | None = None) -> None:
    """Send the packages' lines of at least `level` to `stream` (standard error); `form` is text or json."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    for name in ROOTS:
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(level.upper())
        logger.propagate = False


@contextmanager
def call_noted(call_id: str) -> Iterator[str]:
    """Inside, a call of this id is served by the current task."""
    identified, noted = CALL_ID.set(call_id), _NOTED.set({})
    try:
        yield call_id
    finally:
        CALL_ID.reset(identified)
        _NOTED.reset(noted)


def note(**facts: object) -> None:
    """Add facts to every further line of the call that is served, its last line included. Empty ones are left out."""
    noted = _NOTED.get()
    if noted is not None:
        noted.update(
            {
                key: value[:_MOST_NOTED] if isinstance(value, str) else value
                for key, value in facts.items()
                if value not in ("", None)
            }
        )


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The record's own fields, and when a call is being served its id and what was noted of it."""
    fields: dict[str, Any] = dict(getattr(record, "fields", {}))
    call_id = CALL_ID.get()
    if call_id:
        fields.setdefault("call_id", call_id)
    return {**fields, **{key: value for key, value in (_NOTED.get() or {}).items() if key not in fields}}


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
