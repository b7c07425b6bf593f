"""Rendering of adapters' own chat templates, in child processes that can be ended.

A base's template was chosen by the operator and runs in the server; an adapter's is a program of whoever uploaded it.
Jinja's sandbox keeps it from everything but time and memory, and a process keeps it from these.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any, Final, cast

from jinja2.exceptions import TemplateError

from loramux_server.text.chat_faults import ChatRefused
from loramux_server.text.template_child import CPU_SECONDS, MEMORY_BYTES

PROCESSES: Final = 2
_WALL_SECONDS: Final = 60.0  # of a machine on which the child waits for others most of the time
_PAUSE_SECONDS: Final = 60.0  # a template that exceeded its limits is not run again before


class TemplateSandbox:
    """At most PROCESSES children, made when they are needed. Safe from any thread; calls wait for a free one."""

    def __init__(self) -> None:
        self._free: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(PROCESSES):
            self._free.put(None)
        self._paused: dict[str, float] = {}  # template -> when it may run again
        self._lock = threading.Lock()

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        tokens: Mapping[str, str],
    ) -> str:
        """The text of a conversation, up to where the answer begins; `tokens` are the special ones by role.

        Raises TemplateError with what the template says itself, ValueError where it fails, ChatRefused where it takes
        too much: then it is not run again for a minute.
        """
        return self._run(
            {"template": template, "messages": list(messages), "tools": list(tools), "tokens": dict(tokens)}
        )

    def check(self, template: str) -> None:
        """Whether it is a template at all. Raises as `render` does; a TemplateError has the line."""
        self._run({"template": template, "messages": None, "tools": [], "tokens": {}})

    def _run(self, job: Mapping[str, Any]) -> str:
        template = job["template"]
        self._check_pause(template)
        child = self._free.get()
        try:
            child = child or _Child()
            answer = child.ask(job)
            if answer is None or answer.get("worn"):
                child.close()
                child = None
        except BaseException:
            if child is not None:
                child.close()
            child = None
            raise
        finally:
            self._free.put(child)
        if answer is None or answer.get("exceeded"):
            with self._lock:
                self._paused[template] = time.monotonic() + _PAUSE_SECONDS
            raise _exceeded()
        if "error" in answer:
            raise TemplateError(answer["error"]) if answer["error"] else ValueError("the template failed")
        text: str = answer["text"]
        return text

    def close(self) -> None:
        """Ends the children that are free."""
        for _ in range(PROCESSES):
            try:
                child = self._free.get_nowait()
            except queue.Empty:
                return
            if child is not None:
                child.close()

    def _check_pause(self, template: str) -> None:
        now = time.monotonic()
        with self._lock:
            self._paused = {key: until for key, until in self._paused.items() if until > now}
            if template in self._paused:
                raise _exceeded()


def _exceeded() -> ChatRefused:
    return ChatRefused(
        f"the adapter's own chat template takes more than {CPU_SECONDS} s of processor time or "
        f"{MEMORY_BYTES >> 20} MiB for a conversation: send text or token ids"
    )


class _Child:
    def __init__(self) -> None:
        # Without the server's environment: what is in it is nobody's business there.
        environment = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH") if key in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "loramux_server.text.template_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )
        self._stdin, self._stdout = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        if self._read_line() is None:
            self.close()
            raise ChatRefused("the adapter's own chat template cannot be rendered now: send text or token ids")

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer; None where the child ended over it, or does not answer."""
        data = json.dumps(job).encode() + b"\n"
        writer = threading.Thread(target=_write, args=(self._stdin, data), daemon=True)
        writer.start()  # a child that ended, or reads no further, must not hold this thread
        line = self._read_line()
        return None if line is None else json.loads(line)

    def _read_line(self) -> bytes | None:
        found, end = bytearray(), time.monotonic() + _WALL_SECONDS
        while not found.endswith(b"\n"):
            ready, _, _ = select.select([self._stdout], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._stdout.fileno(), 1 << 20) if ready else b""
            if not data:
                return None
            found += data
        return bytes(found)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):  # what could not be written to a dead process
                pipe.close()


def _write(stdin: IO[bytes], data: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):  # it ended: the reader says so
        stdin.write(data)
        stdin.flush()
