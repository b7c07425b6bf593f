"""Memory that was freed is used again without new pages from the system."""

import subprocess
import sys

import pytest

from loramux_trainer.fleet.memory import keep_freed_memory

_FAULTS = """
import resource
from loramux_trainer.fleet.memory import keep_freed_memory
if {kept}:
    keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(1 << 26)
    del block
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(*, kept: bool) -> int:
    """Pages that the third block of 64 MiB in a process asks the system for."""
    command = [sys.executable, "-c", _FAULTS.format(kept=kept)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's own")
def test_freed_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _faults(kept=True) < 32 < _faults(kept=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert _faults(kept=True) > 32  # the user's choice stays
    assert not keep_freed_memory()
