"""Where the embedded base `loramux-tiny` lies: a Hugging Face directory shipped inside this package.

Made by `python -m loramux_trainer.tiny.build`. Torch-free.
"""

from __future__ import annotations

from pathlib import Path

TINY_NAME = "loramux-tiny"


def tiny_path() -> Path:
    """The checkpoint's directory."""
    return Path(__file__).resolve().parent / TINY_NAME
