"""`loramux adapters merge-files DIR[=WEIGHT]... OUT`: several adapters' directories become one, here.

Imports what needs torch only when it runs.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux.cli.arguments import AsJson
from loramux.terminal.failures import CommandError, ExitCode
from loramux.terminal.output import print_json

if TYPE_CHECKING:
    from loramux_adapters.merging_files import Merged


class Combination(StrEnum):
    """PEFT's combination_type, as far as it is offered."""

    cat = "cat"
    svd = "svd"


def merge_files(
    sources: Annotated[
        list[str], typer.Argument(metavar="DIR[=WEIGHT]", help="PEFT directories of LoRAs; a weight is 1 if unset.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
    combination: Annotated[
        Combination, typer.Option("--combination", help="cat: exact, ranks add; svd: cut to --rank.")
    ] = Combination.cat,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Of svd: the most that a module has.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the adapter that OUT holds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Sum adapters' directories with weights into one that PEFT loads, without a server."""
    from loramux.upload import collect
    from loramux_adapters import merging_files
    from loramux_adapters.formats.limits import ReadLimits

    if (combination is Combination.svd) != (rank is not None):
        raise CommandError(
            "--combination svd and --rank go together", remedy="give both or neither", code=ExitCode.USAGE
        )
    weighted = [_parse(source) for source in sources]
    for directory, _ in weighted:
        collect(directory, "adapter", {}, allow_base_mismatch=False)  # says what a directory without an adapter is
    try:
        merged = merging_files.merge_files(weighted, out, ReadLimits(), rank=rank, force=force)
    except ValueError as error:
        raise CommandError(str(error), code=ExitCode.USAGE) from error
    if as_json:
        print_json({"out": out, "merged": merged})
    else:
        _print(out, merged)


def _parse(source: str) -> tuple[Path, float]:
    """A directory with an equals sign in its name is meant where there is one."""
    whole = Path(source).expanduser()
    directory, equals, weight = source.rpartition("=")
    if not equals or whole.is_dir():
        return whole, 1.0
    try:
        return Path(directory).expanduser(), float(weight)
    except ValueError:
        raise CommandError(
            f"{weight!r} is no number, as in {directory}=0.5", remedy="write DIR=WEIGHT", code=ExitCode.USAGE
        ) from None


def _print(out: Path, merged: Merged) -> None:
    low, high = merged.ranks[0], merged.ranks[-1]
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    base = f"of base {merged.base_fingerprint[:12]}" if merged.base_fingerprint else "of no declared base"
    print(f"{out}: {merged.modules} modules, {ranks}, {base}")
    if merged.energy_kept is not None:
        print(f"the worst module, {merged.worst_module}, keeps {merged.energy_kept:.2%} of its energy")
