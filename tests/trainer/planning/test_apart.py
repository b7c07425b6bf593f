"""A measurement in a process of its own: what it is asked, what it leaves, and how it says that it failed."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loramux_trainer.errors import JobInvalid
from loramux_trainer.planning.apart import TrialFailed, answer, run_apart

PROGRAM = """
import json, os, signal, sys
asked = json.load(sys.stdin)
with open(os.path.join(asked["scratch"], "checkpoint"), "w") as file:
    file.write("much")
if asked["request"]["dies"]:
    os.kill(os.getpid(), signal.SIGKILL)
print("a remark")
print(json.dumps({"beside": os.listdir(asked["scratch"])}))
"""


@dataclass(frozen=True)
class Measured:
    seconds: float


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module on the path, asked in a directory of the user's that has a file called like a library's."""
    for name in ("modules", "user", "scratch"):
        (tmp_path / name).mkdir()
    (tmp_path / "modules" / "some_trial.py").write_text(PROGRAM)
    (tmp_path / "user" / "json.py").write_text("raise SystemExit('the user has a json.py')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path / "user")
    return "some_trial"


def test_a_process_has_a_scratch_directory_that_goes_with_it(program: str, tmp_path: Path) -> None:
    assert run_apart(program, {"dies": False}, "it") == {"beside": ["checkpoint"]}
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_process_that_is_killed_leaves_nothing_behind(program: str, tmp_path: Path) -> None:
    with pytest.raises(TrialFailed, match="it failed: it was ended for want of memory"):
        run_apart(program, {"dies": True}, "it")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_who_is_interrupted_leaves_no_process_behind(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []

    class Interrupted(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._sigint_wait_secs = 0.0  # as where the process takes longer to end
            started.append(self)

        def communicate(self, *arguments: Any, **options: Any) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_apart(program, {"dies": False}, "it")
    assert [process.returncode for process in started] == [-signal.SIGKILL]
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (JobInvalid("model", "is absent"), "model: is absent"),
        (MemoryError(), "the device has too little memory for this job; lower data.max_length"),
    ],
)
def test_what_a_run_would_refuse_is_said_in_its_words(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: dict[str, Any], scratch: Path) -> Measured:
        raise error

    asked = json.dumps({"request": {}, "scratch": str(tmp_path)})
    monkeypatch.setattr(sys, "stdin", io.StringIO(asked))
    with pytest.raises(SystemExit, match=said):
        answer(fail)


def test_a_fault_of_ours_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: dict[str, Any], scratch: Path) -> Measured:
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"request": {}, "scratch": str(tmp_path)})))
    with pytest.raises(ZeroDivisionError):
        answer(fail)
