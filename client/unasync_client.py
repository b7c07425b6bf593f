"""Writes the synchronous client from the asyncio one: `make client`. Prints it, or with --write puts it in its place.

`unasync` replaces the tokens; what its rules do not know is in NAMES and WORDS.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import unasync

PACKAGE = Path(__file__).resolve().parent / "loramux"
SOURCE, TARGET = PACKAGE / "aio.py", PACKAGE / "client.py"

NAMES = {"AsyncClient": "Client", "transport_aio": "transport"}
WORDS = {
    "The asyncio client: one channel, typed answers, bounded retries. Files are read and written off the loop.": (
        "The synchronous client: one channel, typed answers, bounded retries. Thread-safe."
    ),
    "The source of both clients: `make client` writes the synchronous one, `client`, from this.": (
        "Written by `make client` from `aio`, which is the one to change."
    ),
    "use with `async with` or `await close()` it": "use as a context manager or `close()` it",
    "Make it inside a running event loop. Every method": "Every method",
    "is seconds for\n    the whole call,": "is seconds for the whole call,",
    "AsyncGenerator[StreamPart, None]": "Generator[StreamPart, None, None]",
}


def make_sync(source: str) -> str:
    """The synchronous text of `source`, not yet formatted. Raises ValueError where words to be replaced are missing."""
    for words, others in WORDS.items():
        if words not in source:
            raise ValueError(f"{SOURCE.name} says no more: {words!r}")
        source = source.replace(words, others)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, SOURCE.name)
        path.write_text(source, encoding="utf-8")
        unasync.unasync_files([str(path)], [unasync.Rule(f"/{SOURCE.name}", f"/{TARGET.name}", NAMES)])
        return path.with_name(TARGET.name).read_text(encoding="utf-8")


def main() -> None:
    """Format as the linters want it, and print or write it."""
    ruff = [str(Path(sys.executable).with_name("ruff")), "format", "--stdin-filename", str(TARGET), "-"]
    source = make_sync(SOURCE.read_text(encoding="utf-8"))
    made = subprocess.run(ruff, input=source, stdout=subprocess.PIPE, text=True, check=True).stdout
    if sys.argv[1:] == ["--write"]:
        TARGET.write_text(made, encoding="utf-8")
    else:
        sys.stdout.write(made)


if __name__ == "__main__":
    main()
