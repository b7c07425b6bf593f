"""Log lines: one form, fields kept apart, nothing a caller sends can forge a line."""

from __future__ import annotations

import io
import json
import logging

import pytest

from lorica_server.observe.logs import CALL_ID, call_noted, configure_logs, note


@pytest.fixture
def restored() -> object:
    logger = logging.getLogger("lorica_server")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield logger
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.mark.usefixtures("restored")
def test_json_lines_hold_fields_call_id_and_traceback() -> None:
    stream = io.StringIO()
    configure_logs("info", "json", stream)
    token = CALL_ID.set("abc")
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("lorica_server.api").exception("failed", extra={"fields": {"method": "/x"}})
    finally:
        CALL_ID.reset(token)
    entry = json.loads(stream.getvalue())
    assert (entry["level"], entry["message"], entry["method"], entry["call_id"]) == ("error", "failed", "/x", "abc")
    assert "ValueError: boom" in entry["exception"]


@pytest.mark.usefixtures("restored")
def test_text_lines_quote_what_could_forge_a_line() -> None:
    stream = io.StringIO()
    configure_logs("info", "text", stream)
    logging.getLogger("lorica_server.access").info("call", extra={"fields": {"peer": "a\nb INFO x", "seconds": 0.25}})
    logging.getLogger("lorica_server.access").debug("hidden")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].endswith('INFO call peer="a\\nb INFO x" seconds=0.25')


@pytest.mark.usefixtures("restored")
def test_what_is_noted_of_a_call_is_on_its_lines_and_on_no_other() -> None:
    stream = io.StringIO()
    configure_logs("info", "text", stream)
    logger = logging.getLogger("lorica_server.access")
    note(adapter="nobody's")  # no call is served: without effect
    with call_noted("abc"):
        note(adapter="german", digest=None, request_id="")
        note(prompt_tokens=0, x_request_id="x" * 1000)
        logger.info("call", extra={"fields": {"code": "OK"}})
    logger.info("later")
    first, second = stream.getvalue().splitlines()
    assert first.endswith(f"INFO call code=OK call_id=abc adapter=german prompt_tokens=0 x_request_id={'x' * 256}")
    assert second.endswith("INFO later")
