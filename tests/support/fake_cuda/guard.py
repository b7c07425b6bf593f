"""Loads the device guard that lets fake tensors be of device "cuda" in a torch without CUDA; for this whole process."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("guard.cpp")


def why_unavailable() -> str | None:
    """Why it cannot be loaded here; None where it can."""
    if torch.version.cuda is not None:
        return "torch is built with CUDA and has a device guard of its own"
    return None if _compiler() else "there is no C++ compiler (c++, g++ or clang++)"


@cache
def load() -> None:
    """Compiles and loads it, once per process. CalledProcessError with the compiler's output."""
    compiler = _compiler()
    assert compiler is not None
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "guard.so"
        subprocess.run(
            [compiler, "-std=c++20", "-O1", "-shared", "-fPIC"]
            + [f"-I{path}" for path in cpp_extension.include_paths()]
            + [str(SOURCE), "-o", str(library)]
            + [f"-L{path}" for path in cpp_extension.library_paths()]
            + ["-lc10"],
            check=True,
        )
        ctypes.CDLL(str(library))


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
