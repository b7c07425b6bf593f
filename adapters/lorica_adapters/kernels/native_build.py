"""Compiles native.c for the processor it will run on: once per source, flags, compiler and processor."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import platformdirs

SOURCE = Path(__file__).with_name("native.c")
FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC",
    # Sums may be reordered, so that they use whole vectors; NaN and infinities keep their meaning.
    "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno", "-ffp-contract=fast",
)  # fmt: skip
SECONDS = 60


class BuildFailed(Exception):
    """No compiler, or it refused: says which and how."""


def build() -> Path:
    """The shared library, compiled when there is none yet for this machine. Raises BuildFailed or OSError."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BuildFailed("there is no C compiler (cc, gcc or clang); install one, or set CC")
    directory = Path(platformdirs.user_cache_dir("lorica", appauthor=False)) / "kernels"
    target = directory / f"native-{_key(compiler)}.so"
    if not target.exists():
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _compile(compiler, target)
    return target


def _key(compiler: str) -> str:
    """-march=native means another thing on another processor, and a cache may be shared between machines."""
    told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0].splitlines()
    processor = [line for line in told if line.startswith(("model name", "flags", "Features", "CPU part"))]
    parts = [SOURCE.read_bytes(), *map(str.encode, (*FLAGS, compiler, *processor))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _compile(compiler: str, target: Path) -> None:
    """Into a temporary file first: whoever looks at `target` sees a whole library or none."""
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    try:
        command = [*compiler.split(), *FLAGS, str(SOURCE), "-o", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode:
            raise BuildFailed(f"{compiler} refused native.c: {done.stderr.strip()[-500:]}")
        os.replace(name, target)
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"{compiler} took longer than {SECONDS} s") from error
    finally:
        Path(name).unlink(missing_ok=True)
