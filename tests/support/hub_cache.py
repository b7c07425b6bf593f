"""A local hub cache as huggingface_hub lays it out, with the embedded base under another name."""

import shutil
from pathlib import Path

from loramux_adapters.embedded.tiny import tiny_path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_tiny(cache: Path, model: str, *, without: str = "nothing") -> Path:
    """Put the embedded base into `cache` as the hub's `model`, all but the files that `without` matches."""
    folder = cache / ("models--" + model.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(tiny_path(), folder / "snapshots" / COMMIT, ignore=shutil.ignore_patterns(without)))
