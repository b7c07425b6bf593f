"""A file system of a few megabytes that can really be full."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A real file system of its own; the test is skipped where mounting is not allowed."""
    path.mkdir()
    mount = shutil.which("mount")
    if mount is None:
        pytest.skip(f"a full disk is a tmpfs of {size}, and there is no mount program on PATH to make one")
    if os.geteuid() != 0:
        pytest.skip(f"a full disk is a tmpfs of {size}, and only root may mount one; user id is {os.geteuid()}")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        reason = done.stderr.decode().strip() or f"exit code {done.returncode}"
        pytest.skip(
            f"a full disk is a tmpfs of {size}, and root may not mount one here (containers need SYS_ADMIN): {reason}"
        )
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill(stream: RawIOBase) -> None:
    """Write until there is no space."""
    while True:
        stream.write(b"x" * 4096)
