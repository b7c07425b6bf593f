"""`python -m support.fake_cuda` prints what every mix costs on CUDA; `--update` lowers the budgets to it.

`--update --raise` raises them too: say in the commit what it is paid for.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from support.fake_cuda import budgets, guard
from support.fake_cuda.engine import no_cuda_library
from support.fake_cuda.mixes import LAYERS, Mixes


def main(options: list[str]) -> str | None:
    """Returns why it failed."""
    why = guard.why_unavailable()
    if why is not None:
        return why
    guard.load()
    with tempfile.TemporaryDirectory() as root, no_cuda_library():
        measured = {mix: budgets.counts_of(ledger, LAYERS) for mix, ledger in Mixes(Path(root)).measure()}
    if "--update" not in options:
        print(json.dumps(measured))
        return None
    known = budgets.read() if budgets.FILE.exists() else {}
    risen = {mix: budgets.risen(known[mix], counts) for mix, counts in measured.items() if mix in known}
    if any(risen.values()) and "--raise" not in options:
        return "\n".join(f"{mix}: {line}" for mix, lines in risen.items() for line in lines)
    budgets.write(measured)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
