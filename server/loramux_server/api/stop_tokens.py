"""Stop strings that spell special tokens.

No text shows a special token, so such a string would never be found in one: it stops at the token instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loramux_server.errors import InvalidRequest
from loramux_server.requests import StopConditions


def resolve_stop_tokens(stop: StopConditions, special_tokens: Mapping[str, int], vocabulary: int) -> StopConditions:
    """`stop` with the ids of the special tokens that its strings spell, besides the strings.

    `special_tokens` is text -> id. Raises InvalidRequest for a string that holds a special token and more.
    """
    ids = set(stop.stop_token_ids)
    for index, string in enumerate(stop.stop_strings):
        token = special_tokens.get(string)
        if token is None:
            _refuse_partial(f"stopping.stop_strings[{index}]", string, special_tokens)
        elif token < vocabulary:  # the model never makes another
            ids.add(token)
    return replace(stop, stop_token_ids=tuple(sorted(ids)))


def _refuse_partial(field: str, string: str, special_tokens: Mapping[str, int]) -> None:
    # A blank special token, such as a line break, is an ordinary part of many a string.
    held = [text for text in special_tokens if text.strip() and text in string]
    if held:
        text = max(held, key=len)
        raise InvalidRequest(
            field,
            f"holds the special token {text}, which the output's text never shows, so the string would never match: "
            f"to stop at the token give {text} alone",
        )
