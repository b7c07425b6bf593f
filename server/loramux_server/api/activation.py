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
    found = _find_last(prompt, invocation)
    if found is not None:
        return found
    shown = ", ".join(map(str, invocation[:16])) + (", ..." if len(invocation) > 16 else "")
    raise InvalidRequest(
        "input",
        f"the prompt does not hold the tokens that activate this adapter ({shown})",
        metadata={"invocation_tokens": shown},
    )


def _find_last(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where the last occurrence of `wanted` begins, from the end on, in time of the sum of both lengths whatever they
    hold (Knuth, Morris, Pratt): the adapter's owner chose the one and a caller the other, and the event loop waits.
    """
    last_first = wanted[::-1]
    borders = _borders(last_first)
    matched = 0
    for place in range(len(tokens) - 1, -1, -1):
        token = tokens[place]
        while matched and token != last_first[matched]:
            matched = borders[matched - 1]
        if token == last_first[matched]:
            matched += 1
            if matched == len(last_first):
                return place
    return None


def _borders(wanted: Sequence[int]) -> list[int]:
    """For each beginning of `wanted` the length of the longest shorter one that it ends with."""
    borders = [0] * len(wanted)
    length = 0
    for place in range(1, len(wanted)):
        while length and wanted[place] != wanted[length]:
            length = borders[length - 1]
        length += wanted[place] == wanted[length]
        borders[place] = length
    return borders
