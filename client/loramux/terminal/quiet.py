"""Silences what a library says to people who did not ask: bars within bars."""

from __future__ import annotations


def hush_bars() -> None:
    """No bar of transformers' own for each checkpoint that is written or read on the way. Imports transformers."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
