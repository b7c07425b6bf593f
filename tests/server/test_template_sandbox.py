"""The processes that render adapters' templates: what templates leave behind in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux_server.text.template_child import MEMORY_BYTES, STATUS
from loramux_server.text.template_sandbox import TemplateSandbox

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.skipif(not STATUS.exists(), reason="memory is bounded on Linux")
def test_templates_with_large_constants_leave_no_growing_process() -> None:
    """The library keeps 128 compiled templates: these would be 2.5 GB."""
    sandbox = TemplateSandbox()
    pids: set[int] = set()
    for number in range(24):
        constant = f'{{% set x = "a{number}" * 8000000 %}}'
        assert sandbox.render(constant + "{{ messages[0].content }}", MESSAGES, (), {}) == "hi"
        for child in list(sandbox._free.queue):
            if child is not None:
                pids.add(child._process.pid)
                status = Path(f"/proc/{child._process.pid}/status").read_text()
                resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
                assert resident << 10 < 2 * MEMORY_BYTES
    assert len(pids) > 1
    sandbox.close()
