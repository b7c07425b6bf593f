"""Makes a small random checkpoint of every causal architecture transformers has and says what the server does with it.

    python docs/check_models.py [--write] [ARCHITECTURE ...]

Each is loaded in NF4 with float32 compute and examined as at a server's start. One that is accepted serves a mixed
batch (chunked prompts, decodes, a window narrower than the prompts) and every logit is compared with the untouched
model alone. Exits with 1 when one is accepted and differs, or fails by anything but a refusal. `--write` renews
docs/models.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
PAGE = Path(__file__).parent / "models.md"
MEMORY = 6 << 30
SECONDS = 120

Verdict = tuple[str, str]
"""What came of it (served, refused, wrong, traceback, none) and the figure or the reason."""


def check(architecture: str) -> Verdict:
    """The verdict on one architecture, in this process."""
    from support.architectures import save_small
    from support.exactness import refusal_or_error

    with tempfile.TemporaryDirectory() as directory:
        try:
            path = save_small(architecture, Path(directory) / "base")
        except Exception as error:
            return "none", f"no small checkpoint: {type(error).__name__}: {_first_line(error)}"
        return refusal_or_error(path)


def check_apart(architecture: str) -> Verdict:
    """The verdict on one architecture, in a process of its own: some take more memory than there is."""
    context = multiprocessing.get_context("fork")  # the parent has imported everything and computed nothing
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(architecture, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS):
            return "traceback", f"no answer within {SECONDS} s"
        verdict: Verdict = ours.recv()
        return verdict
    except EOFError:
        process.join()
        return "traceback", f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _answer(architecture: str, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe.send(check(architecture))


def page(verdicts: dict[str, Verdict]) -> str:
    """docs/models.md."""
    import transformers

    by_kind: dict[str, list[tuple[str, str]]] = {}
    for architecture, (kind, reason) in verdicts.items():
        by_kind.setdefault(kind, []).append((architecture, reason))
    served, refused, none = (by_kind.get(kind, []) for kind in ("served", "refused", "none"))
    lines = [
        "# Models",
        "",
        f"Written by `python docs/check_models.py --write` with transformers {transformers.__version__}: a small",
        "random checkpoint of every causal architecture it has, loaded in NF4 with float32 compute. *Served exactly*",
        "means that a mixed batch of chunked prompts and decodes gives the logits of the untouched model alone; beside",
        "it stands the largest difference, relative to their standard deviation. Everything else is refused at start",
        "with the reason, by `serve` and by `train` alike. The same examination runs on each base before it serves.",
        "",
        f"## Served exactly ({len(served)})",
        "",
        "| architecture | largest difference |",
        "|---|---:|",
        *[f"| {architecture} | {reason} |" for architecture, reason in served],
        "",
        f"## Refused ({len(refused)})",
        "",
        "| architecture | reason |",
        "|---|---|",
        *[f"| {architecture} | {reason.replace('|', chr(92) + '|')} |" for architecture, reason in refused],
    ]
    if none:
        lines += [
            "",
            f"## Not tried ({len(none)})",
            "",
            "No small configuration was found for these; a server examines them as any other base.",
            "",
            ", ".join(architecture for architecture, _ in none),
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("architectures", nargs="*")
    options = parser.parse_args()
    import torch

    from support.architectures import causal_architectures
    from support.exactness import refusal_or_error  # noqa: F401 -- before the processes part

    torch.set_num_threads(1)
    verdicts: dict[str, Verdict] = {}
    for architecture in options.architectures or causal_architectures():
        verdicts[architecture] = check_apart(architecture)
        print(architecture, *verdicts[architecture], sep="\t", flush=True)
    if options.write:
        PAGE.write_text(page(verdicts))
    return int(any(kind in ("wrong", "traceback") for kind, _ in verdicts.values()))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


if __name__ == "__main__":
    sys.exit(main())
