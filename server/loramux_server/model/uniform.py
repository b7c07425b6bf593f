"""Counter-based uniform numbers: a number for (seed, choice, position, round), whatever was drawn before.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
Integers only, so every machine draws the same. Knows nothing of logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

_Words = npt.NDArray[np.uint64]

_ROUNDS: Final = 10
_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_LOW: Final = np.uint64(0xFFFFFFFF)
_WORD: Final = np.uint64(32)


def philox(counters: npt.ArrayLike, keys: npt.ArrayLike) -> _Words:
    """Encrypt each 128-bit counter under its 64-bit key.

    `counters` is [n, 4] and `keys` [n, 2], 32-bit words, least significant first; so is the result, [n, 4].
    """
    c0, c1, c2, c3 = np.asarray(counters, dtype=np.uint64).reshape(-1, 4).T
    k0, k1 = np.asarray(keys, dtype=np.uint64).reshape(-1, 2).T
    for step in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        step_k0 = (k0 + np.uint64(step * _WEYL[0])) & _LOW
        step_k1 = (k1 + np.uint64(step * _WEYL[1])) & _LOW
        c0, c1, c2, c3 = (
            (second >> _WORD) ^ c1 ^ step_k0,
            second & _LOW,
            (first >> _WORD) ^ c3 ^ step_k1,
            first & _LOW,
        )
    return np.stack((c0, c1, c2, c3), axis=1)


def uniforms(keys: Sequence[tuple[int, int, int]], draw_round: int) -> list[float]:
    """One number in [0, 1) with 53 random bits for each (seed, choice, position).

    `draw_round` separates the draws one token may need. Seeds count modulo 2^64, the rest modulo 2^32.
    """
    if not keys:
        return []
    mask = 0xFFFFFFFF
    counters = [(position & mask, choice & mask, draw_round & mask, 0) for _, choice, position in keys]
    words = philox(counters, [(seed & mask, (seed >> 32) & mask) for seed, _, _ in keys])
    bits = (words[:, 0] << np.uint64(21)) | (words[:, 1] >> np.uint64(11))
    numbers: list[float] = (bits.astype(np.float64) * 2.0**-53).tolist()
    return numbers
