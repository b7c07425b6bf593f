"""Write adapters out of `lost/` as directories to push again: `python -m loramux_adapters.store.restore STORE OUTPUT`.

Changes nothing in the store and needs no lock: a server may be running.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.errors import REFUSED, AdapterError, StoreUnavailable
from loramux_adapters.store.disk import Disk, storage_errors
from loramux_adapters.store.journal import Publication, read_journal
from loramux_adapters.store.lost import DIRECTORY as LOST
from loramux_adapters.store.lost import lost_files


@dataclass(frozen=True)
class Restored:
    """What was written, as (tenant, name, directory), and the files of no known adapter."""

    adapters: tuple[tuple[str, str, Path], ...]
    unnamed: tuple[Path, ...]


def restore(root: Path, output: Path) -> Restored:
    """Copy every adapter that needs a file of `lost/` to `output/<tenant>/<name>@<digest>`, each hash checked.

    Raises StoreUnavailable (no store there, or it cannot be read or written).
    """
    if not (root / "blobs").is_dir():
        raise StoreUnavailable("there is no store in that directory", subject="store", remedy="check the path")
    disk = Disk()
    with storage_errors("be restored"):
        lost = lost_files(root, disk)
        adapters, named = [], set[str]()
        for publication in _latest(read_journal(root, disk)):
            sources = {file: _find(root, lost, sha256, disk) for file, sha256 in publication.files.items()}
            if lost.keys() & publication.files.values() and all(sources.values()):
                named.update(publication.files.values())
                adapters.append((publication.tenant, publication.name, _write(output, publication, sources)))
        return Restored(tuple(adapters), tuple(lost[sha256] for sha256 in sorted(lost.keys() - named)))


def _latest(publications: list[Publication]) -> list[Publication]:
    """One per tenant, name and digest: what was sent last."""
    return list({(entry.tenant, entry.name, entry.digest): entry for entry in publications}.values())


def _find(root: Path, lost: dict[str, Path], sha256: str, disk: Disk) -> Path | None:
    for path in (lost.get(sha256), root / "blobs" / sha256[:2] / sha256):
        if path is not None and path.is_file() and disk.sha256(path) == sha256:
            return path
    return None


def _write(output: Path, publication: Publication, sources: dict[str, Path | None]) -> Path:
    directory = output / publication.tenant / f"{publication.name}@{publication.digest[:12]}"
    directory.mkdir(parents=True, exist_ok=True)
    for file, source in sources.items():
        if source is not None:
            shutil.copyfile(source, directory / file)
    return directory


def main(arguments: Sequence[str] | None = None) -> int:
    """Restore from the store named on the command line and say what came of it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loramux_adapters.store.restore", description=__doc__)
    parser.add_argument("store", type=Path, help="the server's --data-dir")
    parser.add_argument("output", type=Path, help="where to write the adapters' directories")
    options = parser.parse_args(arguments)
    try:
        restored = restore(options.store, options.output)
    except AdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    if restored.adapters:
        print(f"{len(restored.adapters)} adapters restored to {options.output}")
    else:
        print(f"0 adapters restored: {options.store / LOST} holds none whole")
    for _, name, directory in restored.adapters:
        print(f"loramux adapters push {directory} {name}")
    for path in restored.unnamed:
        print(f"belongs to no known adapter: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
