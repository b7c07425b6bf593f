"""Reads many adapters that were changed at random; `make fuzz`.

    python tests/fuzz [--rounds 100000] [--seed N]

Fails where one ends in anything but an answer or an AdapterError, where a refusal takes over 50 ms of processor time
twice, or where the process grows by more than 64 MiB after the first tenth.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.all_kinds import make_all_kinds
from support.checkpoints import float_base, save_checkpoint, wide_model
from support.fuzz import Fuzzer

_GROWTH_KIB = 64 << 10


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loramux-fuzz-") as folder:
        root = Path(folder)
        checkpoint = save_checkpoint(wide_model("llama"), root / "base")
        directories = make_all_kinds(checkpoint, root / "kinds", "llama")
        scratch = root / "scratch"
        scratch.mkdir()
        print(f"seed {options.seed}, {len(directories)} kinds", flush=True)
        fuzzer = Fuzzer(directories, float_base(checkpoint).spec, scratch, options.seed)
        tenth = max(1, options.rounds // 10)
        before = 0
        for part in range(10):
            outcomes = fuzzer.run(tenth)
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            before = before or used
            print(f"{(part + 1) * tenth}: {outcomes.read} read, {outcomes.refused}, {used >> 10} MiB", flush=True)
        if outcomes.slow:
            print(f"{len(outcomes.slow)} took too long: {outcomes.slow[:10]}")
        if used - before > _GROWTH_KIB:
            print(f"grew by {used - before} KiB")
        return int(bool(outcomes.slow) or used - before > _GROWTH_KIB)


if __name__ == "__main__":
    sys.exit(main())
