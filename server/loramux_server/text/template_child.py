"""The child process that renders chat templates of adapters: programs of strangers, with little time and memory.

One JSON line a job on its input, one a result on its output. What exceeds processor time kills it, and the parent makes
another, as it does of one that says it is worn: that kept too much memory. Imports no torch.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateSyntaxError

STATUS = Path("/proc/self/statm")
CPU_SECONDS = 2
MEMORY_BYTES = 256 << 20
"""What one job may take beyond what the process has."""
NICENESS = 10  # steps of the model go first
MAX_RENDERED = 16 << 20
"""Characters; more fit no context."""


def main() -> None:
    """Serves until its input ends."""
    os.nice(NICENESS)
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers does without, and starts in a second
    from transformers.utils.chat_template_utils import render_jinja_template

    out = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints is no result
    print(json.dumps({"ready": True}), file=out, flush=True)
    begun = _used_bytes()
    for line in sys.stdin:
        _limit()
        answer = _render(render_jinja_template, json.loads(line))
        # Compiled templates are kept by the library, with all that their constants take.
        answer["worn"] = _used_bytes() - begun > MEMORY_BYTES
        print(json.dumps(answer), file=out, flush=True)


def _render(render: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Without messages there is no conversation, and the template is only compiled."""
    try:
        found = render(
            conversations=[] if job["messages"] is None else [job["messages"]],
            tools=job["tools"] or None,
            chat_template=job["template"],
            add_generation_prompt=True,
            **job["tokens"],
        )
        texts = found[0] if isinstance(found, tuple) else found
        text = texts[0] if texts else ""
        if len(text) > MAX_RENDERED:
            return {"exceeded": True}
        text.encode()  # half a character is no text
        return {"text": text}
    except MemoryError:
        return {"exceeded": True}
    except TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except Exception as error:  # a template runs arbitrary expressions
        said = type(error).__name__ == "TemplateError"  # by raise_exception, for the caller
        return {"error": str(error)[:2000] if said else ""}


def _limit() -> None:
    """Moves the limits to what this job may take from here on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    if not STATUS.exists():  # elsewhere than on Linux processor time is the only bound
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (_used_bytes() + MEMORY_BYTES, hard))


def _used_bytes() -> int:
    """Of address space; 0 elsewhere than on Linux."""
    if not STATUS.exists():
        return 0
    return int(STATUS.read_text("ascii").split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    main()
