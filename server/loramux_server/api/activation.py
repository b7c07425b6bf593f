"""Where an adapter stands to a prompt: what comes before it, and from which token on it acts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loramux_adapters.spec import AdapterSpec
from loramux_server.errors import InvalidRequest
from loramux_server.requests import Submission


def place_adapter(submission: Submission, spec: AdapterSpec | None) -> Submission:
    """`submission` with the positions of its adapter. Raises InvalidRequest, see `find_activation`."""
    if spec is None:
        return submission
    return replace(
        submission,
        virtual_tokens=spec.virtual_tokens,
        active_from=find_activation(submission.prompt, spec.invocation),
    )


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
