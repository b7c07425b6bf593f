"""Log lines: one form, fields kept apart, nothing a caller sends can forge a line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_adapters.store.local import LocalStore
from loramux_server.observe.logs import CALL_ID, call_noted, configure_logs, note


@pytest.fixture
def restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("loramux_server", "loramux_adapters")]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


@pytest.mark.usefixtures("restored")
def test_json_lines_hold_fields_call_id_and_traceback() -> None:
    stream = io.StringIO()
    configure_logs("info", "json", stream)
    token = CALL_ID.set("abc")
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("loramux_server.api").exception("failed", extra={"fields": {"method": "/x"}})
    finally:
        CALL_ID.reset(token)
    entry = json.loads(stream.getvalue())
    assert (entry["level"], entry["message"], entry["method"], entry["call_id"]) == ("error", "failed", "/x", "abc")
    assert "ValueError: boom" in entry["exception"]


@pytest.mark.usefixtures("restored")
def test_text_lines_quote_what_could_forge_a_line() -> None:
    stream = io.StringIO()
    configure_logs("info", "text", stream)
    logging.getLogger("loramux_server.access").info("call", extra={"fields": {"peer": "a\nb INFO x", "seconds": 0.25}})
    logging.getLogger("loramux_server.access").debug("hidden")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].endswith('INFO call peer="a\\nb INFO x" seconds=0.25')


@pytest.mark.usefixtures("restored")
def test_what_is_noted_of_a_call_is_on_its_lines_and_on_no_other() -> None:
    stream = io.StringIO()
    configure_logs("info", "text", stream)
    logger = logging.getLogger("loramux_server.access")
    note(adapter="nobody's")  # no call is served: without effect
    with call_noted("abc"):
        note(adapter="german", digest=None, request_id="")
        note(prompt_tokens=0, x_request_id="x" * 1000)
        logger.info("call", extra={"fields": {"code": "OK"}})
    logger.info("later")
    first, second = stream.getvalue().splitlines()
    assert first.endswith(f"INFO call code=OK call_id=abc adapter=german prompt_tokens=0 x_request_id={'x' * 256}")
    assert second.endswith("INFO later")


@pytest.mark.usefixtures("restored")
def test_what_the_store_says_is_a_line_of_the_servers(tmp_path: Path) -> None:
    stream = io.StringIO()
    configure_logs("warning", "json", stream)
    LocalStore(tmp_path).close()
    (tmp_path / "blobs" / "aa").mkdir()
    (tmp_path / "blobs" / "aa" / ("a" * 64)).write_bytes(b"bytes of no adapter")
    LocalStore(tmp_path).close()
    [line] = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["logger"]) == ("warning", "loramux_adapters.store.lost")
    assert "1 stored files that the catalog does not know" in entry["message"]
