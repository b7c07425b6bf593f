"""The ids that a caller gave its call in headers, for the log: x-request-id and W3C traceparent."""

from __future__ import annotations

import re
from collections.abc import Iterable

from loramux_server.observe.logs import note

_REQUEST_ID = "x-request-id"
_TRACE = "traceparent"
_TRACE_FORM = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_MOST = 128  # characters of an id; a header may hold kilobytes


def note_caller(metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
    """Note `x_request_id`, `trace_id` and `span_id` (the caller's span) of the call that is served."""
    headers = {key: value for key, value in metadata or () if key in (_REQUEST_ID, _TRACE)}
    note(x_request_id=str(headers.get(_REQUEST_ID, ""))[:_MOST])
    trace = _TRACE_FORM.fullmatch(str(headers.get(_TRACE, "")).strip())
    if trace is not None:
        note(trace_id=trace[1], span_id=trace[2])
