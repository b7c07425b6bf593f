"""`python tests/mutants [WORDS ...]`: puts each fault of the catalog into a copy of the tree and runs its tests there.

Fails where a fault is noticed by no test, where its text is not found exactly once, or where the tests do not pass
without it. WORDS choose faults by parts of their description; `--check` only looks for the texts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from catalog import MUTANTS
from mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300  # for the tests of one fault; what takes longer shows nothing: the machine may only be slow
SOURCES = ("protos", "adapters", "server", "trainer", "client")
PASSED, FAILED = 0, 1  # pytest's exit codes; others say that tests did not run


def main(arguments: Sequence[str]) -> str | None:
    """Returns what is wrong."""
    words = [word for word in arguments if not word.startswith("-")]
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.fault for word in words)]
    wrong = [problem for mutant in MUTANTS if (problem := find_problem(mutant)) is not None]
    if wrong or "--check" in arguments:
        return "\n".join(wrong) or None
    with tempfile.TemporaryDirectory(prefix="loramux-mutants-") as directory:
        tree = copy_tree(Path(directory) / "tree")
        whole = sorted({test for mutant in chosen for test in mutant.tests})
        code, output = run_tests(tree, whole, SECONDS * 4)
        if code != PASSED:
            return f"the tests do not pass without a fault:\n{output}"
        for number, mutant in enumerate(chosen, 1):
            started = time.monotonic()
            verdict = try_mutant(tree, mutant)
            seconds = time.monotonic() - started
            print(
                f"{number:2} of {len(chosen)}  {verdict or 'noticed':8}  {seconds:5.1f} s  {mutant.fault}", flush=True
            )
            if verdict is not None:
                wrong.append(f"{mutant.fault} ({mutant.file}): {verdict}")
    return "\n".join(wrong) or None


def find_problem(mutant: Mutant) -> str | None:
    """Why the fault cannot be put in or its tests cannot be run."""
    count = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) if (ROOT / mutant.file).exists() else 0
    if count != 1:
        return f"{mutant.fault} ({mutant.file}): its text is found {count} times, not once: {mutant.old!r}"
    missing = [test for test in mutant.tests if not (ROOT / test.partition("::")[0]).exists()]
    return f"{mutant.fault}: no {', '.join(missing)}" if missing else None


def try_mutant(tree: Path, mutant: Mutant) -> str | None:
    """None where a test fails for it."""
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code, output = run_tests(tree, mutant.tests, SECONDS)
    except subprocess.TimeoutExpired:
        return f"its tests took over {SECONDS} s: name fewer, or take a fault that hangs none"
    finally:
        path.write_text(text, encoding="utf-8")
    if code == FAILED:
        return None
    return "SURVIVED" if code == PASSED else f"its tests did not run:\n{output}"


def run_tests(tree: Path, tests: Sequence[str], seconds: float) -> tuple[int, str]:
    """(pytest's exit code, the end of its output). TimeoutExpired."""
    # Before the editable installation: what is imported is the copy.
    paths = os.pathsep.join(str(tree / source) for source in SOURCES)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *tests],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    return done.returncode, done.stdout[-4000:]


def copy_tree(target: Path) -> Path:
    """The working tree without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
