"""A process of its own that answers JSON lines, and the loop inside it.

Between its turns it waits on a pipe and takes no processor. Imports nothing that computes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loramux.bench.driver import DriverFailed

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class Peer:
    """A module of this package, run as a program. `title` stands in messages; `log` takes its standard error."""

    def __init__(self, title: str, module: str, *, threads: int, log: Path) -> None:
        self._title, self._log = title, log
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environ,
                start_new_session=True,
            )

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """One line there and one back. Raises DriverFailed with the end of its log where it has died."""
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a peer has pipes")
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            tail = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
            raise DriverFailed(f"the {self._title} peer ended:\n" + "\n".join(tail))
        values: dict[str, Any] = json.loads(answer)
        return values

    def close(self) -> None:
        """Ends it. Idempotent."""
        process = self._process
        if process.stdin is not None:
            with contextlib.suppress(OSError):  # it flushes: a peer that died has broken the pipe, and that was told
                process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def answer_lines(make: Callable[[dict[str, Any]], Answer]) -> None:
    """Inside the process: the first line sets up, each further one is a question, until the pipe closes."""
    answer: Answer | None = None
    for line in sys.stdin:
        message = json.loads(line)
        if answer is None:
            answer, answered = make(message), {"ready": True}
        else:
            answered = answer(message)
        print(json.dumps(answered), flush=True)
