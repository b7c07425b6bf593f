"""C sources beside Python modules, compiled once for the processor they will run on and kept in the user's cache.

Once per source, flags, compiler and processor. Knows no kernel. Where a library cannot be had, plain torch serves.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import platformdirs

HEADERS = Path(__file__).parent
FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC",
    # Sums may be reordered, so that they use whole vectors; NaN and infinities keep their meaning.
    "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno", "-ffp-contract=fast",
)  # fmt: skip
SECONDS = 60

logger = logging.getLogger(__name__)


class BuildFailed(Exception):
    """No compiler, or it refused: says which and how."""


@cache
def find_library(source: Path) -> Path | None:
    """The compiled `source`, or None (and one log line) where it cannot be had."""
    if platform.system() != "Linux":
        return None
    try:
        built = build(source)
        ctypes.CDLL(str(built))
    except (BuildFailed, OSError) as error:
        logger.warning("%s is off, plain torch serves: %s", source.stem, error)
        return None
    return built


def build(source: Path) -> Path:
    """The shared library of `source`, compiled when there is none yet for this machine. BuildFailed or OSError."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BuildFailed("there is no C compiler (cc, gcc or clang); install one, or set CC")
    directory = Path(platformdirs.user_cache_dir("loramux", appauthor=False)) / "kernels"
    stem = f"{source.stem}-{_key(source, compiler)}"
    for library in directory.glob(f"{stem}-*.so"):
        # Its name tells its content: loading one that was cut or has rotted could kill the process.
        if library.name == _name(stem, library.read_bytes()):
            return library
        library.unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return _compile(compiler, source, directory, stem)


def _name(stem: str, content: bytes) -> str:
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _key(source: Path, compiler: str) -> str:
    """-march=native means another thing on another processor, and a cache may be shared between machines."""
    told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0].splitlines()
    processor = [line for line in told if line.startswith(("model name", "flags", "Features", "CPU part"))]
    files = [source, *sorted(HEADERS.glob("*.h"))]
    parts = [*(file.read_bytes() for file in files), *map(str.encode, (*FLAGS, compiler, *processor))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _compile(compiler: str, source: Path, directory: Path, stem: str) -> Path:
    """Into a temporary file first: whoever looks finds a whole library or none."""
    handle, name = tempfile.mkstemp(dir=directory, suffix=".tmp")
    os.close(handle)
    try:
        command = [*compiler.split(), *FLAGS, "-I", str(HEADERS), str(source), "-o", name, "-lm"]
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=SECONDS, check=False
        )
        if done.returncode:
            raise BuildFailed(f"{compiler} refused {source.name}: {done.stderr.strip()[-500:]}")
        library = directory / _name(stem, Path(name).read_bytes())
        os.replace(name, library)
        return library
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"{compiler} took longer than {SECONDS} s") from error
    finally:
        Path(name).unlink(missing_ok=True)
