"""Real servers to be killed by the dozen: `python -m support.killable_server`, one data directory a line on stdin.

Imports what a server imports once, then forks each server: App, gRPC, store, registry and format reader are real,
only the engine computes nothing. A child says "pid PID", then "ready ADDRESS"; "ended CODE" follows when it was killed.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from loramux_adapters.formats import registry as formats
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.spec import BaseModelSpec
from loramux_adapters.weights import AdapterWeights
from loramux_server.app import App
from support.servers import Inside, serve_config
from support.tiny import load_tiny


async def serve(data_dir: Path, base: BaseModelSpec) -> None:
    """Serve until killed, or until whoever gives the orders is gone."""

    def read(files: Mapping[str, Path], *, allow_base_mismatch: bool) -> AdapterWeights:
        return formats.read(files, base, ReadLimits(), allow_base_mismatch=allow_base_mismatch)

    app = App(serve_config(data_dir), Inside(read=read).build)
    await app.start()
    say(f"ready {app.address}")
    asyncio.get_running_loop().add_reader(0, lambda: os.read(0, 1) or os._exit(1))
    await app.serve()


def say(line: str) -> None:
    """One write: whole or not there, and no buffer that dies with the process."""
    os.write(1, f"{line}\n".encode())


def main() -> None:
    """Serve orders until stdin ends."""
    base = load_tiny().spec  # of the real base; its weights are not needed any more
    say("here")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            say(f"pid {os.getpid()}")  # by itself: what the parent says may come after "ready"
            try:
                asyncio.run(serve(Path(line.strip()), base))
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        say(f"ended {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
