"""Silences what libraries say to people who did not ask: advice that is wrong here, and bars within bars."""

from __future__ import annotations

import logging


def hush_advice() -> None:
    """bitsandbytes recommends a package that would fetch another CPU kernel from a hub; `lorica doctor` warns of it."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def hush_loading() -> None:
    """No bar of transformers' own for each load of a small model. Imports transformers."""
    from transformers.utils.logging import disable_progress_bar

    hush_advice()
    disable_progress_bar()
