"""The counter-based numbers: Random123's known answers, and that they look uniform."""

from __future__ import annotations

import pytest
import torch

from loramux_server.model.uniform import philox, uniforms
from support.chi_square import chi_square_p_value


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # kat_vectors of Random123 1.14, philox4x32 10
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    assert philox([counter], [key]).tolist() == [answer]
    assert philox([[1, 2, 3, 4], counter], [[5, 6], key])[1].tolist() == answer


@pytest.mark.parametrize("vary", ["seed", "choice", "position", "round"])
def test_numbers_are_uniform_along_every_coordinate(vary: str) -> None:
    keys = {
        "seed": [(i, 0, 5) for i in range(20000)],
        "choice": [(1, i, 5) for i in range(20000)],
        "position": [(1, 0, i) for i in range(20000)],
        "round": [],
    }[vary]
    numbers = torch.tensor(uniforms(keys, 0) if keys else [uniforms([(1, 0, 5)], i)[0] for i in range(4000)])
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    cells = torch.histc(numbers, bins=100, min=0.0, max=1.0)
    assert chi_square_p_value(cells, torch.ones(100)) > 1e-3
    assert abs(torch.corrcoef(torch.stack((numbers[1:], numbers[:-1])))[0, 1]) < 0.05


def test_extreme_keys_are_fine_and_distinct() -> None:
    assert uniforms([], 0) == []
    keys = [(0, 0, 0), (2**64 - 1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len(set(uniforms(keys, 0)) | set(uniforms(keys, 1))) == 10
