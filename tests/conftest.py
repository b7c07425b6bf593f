"""What every test runs under: one thread per worker, no network, nobody's real caches or data.

Set before torch or huggingface_hub are imported, and inherited by the servers that tests start.
"""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import hypothesis
import pytest

# Both measure the machine: a full garbage collection of a process with torch takes longer than the deadline of one
# example (0.2 s), and another process on the core makes drawing values "too slow".
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")

_SCRATCH = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    scratch = Path(tempfile.mkdtemp(prefix="loramux-tests-"))
    config.stash[_SCRATCH] = scratch
    os.environ |= {
        # Two workers on two cores: a second thread in each only makes timings worse.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "huggingface"),
        # A server started without --data must not find the user's store.
        "XDG_DATA_HOME": str(scratch / "data"),
        "XDG_CONFIG_HOME": str(scratch / "config"),
        "XDG_CACHE_HOME": str(scratch / "cache"),
        # Rich wraps at the terminal's width: tests read what users see at one fixed width.
        "COLUMNS": "120",
        "NO_COLOR": "1",
    }
    for name in [name for name in os.environ if name.startswith("LORAMUX_")]:
        del os.environ[name]
    # Under nohup, or in the background of a script, these are ignored, by every process that tests start too.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_SCRATCH], ignore_errors=True)
