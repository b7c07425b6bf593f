"""Where the embedded base `lorica-tiny` lies: a Hugging Face directory shipped inside this package.

Made by `python -m lorica_trainer.tiny.build`. Torch-free.
"""

from __future__ import annotations

from pathlib import Path

TINY_NAME = "lorica-tiny"


def tiny_path() -> Path:
    """The checkpoint's directory."""
    return Path(__file__).resolve().parent / TINY_NAME
