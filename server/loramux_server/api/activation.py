"""Where in a prompt an activated LoRA begins to act."""

from __future__ import annotations

from collections.abc import Sequence

from loramux_server.errors import InvalidRequest


def find_activation(prompt: Sequence[int], invocation: Sequence[int]) -> int:
    """The prompt index at which the last occurrence of `invocation` begins; 0 where the adapter has none.

    Raises InvalidRequest where the prompt does not hold it: the adapter would act nowhere, and the base would answer in
    its name.
    """
    if not invocation:
        return 0
    wanted = tuple(invocation)
    for start in range(len(prompt) - len(wanted), -1, -1):
        if prompt[start] == wanted[0] and tuple(prompt[start : start + len(wanted)]) == wanted:
            return start
    shown = ", ".join(map(str, wanted[:16])) + (", ..." if len(wanted) > 16 else "")
    raise InvalidRequest(
        "input",
        f"the prompt does not hold the tokens that activate this adapter ({shown})",
        metadata={"invocation_tokens": shown},
    )
