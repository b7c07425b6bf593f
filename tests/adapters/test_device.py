"""Which device and format: what can be known without a GPU, by standing in for what torch says of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loramux_adapters.device import DeviceRefused, best_dtype, check_dtype, select_device, use_device

GPU = torch.device("cuda", 0)
SWITCHES = ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A machine with two cards; the dict takes what was set."""
    seen: dict[str, Any] = {"capability": (9, 0)}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.update(current=device))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: seen["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    switches = [(torch.backends.cudnn, "allow_tf32"), *((torch.backends.cuda.matmul, name) for name in SWITCHES)]
    before = [getattr(module, name) for module, name in switches]
    for module, name in switches:
        setattr(module, name, True)
    yield seen
    for (module, name), value in zip(switches, before, strict=True):
        setattr(module, name, value)


def test_a_gpu_is_made_current_and_accumulates_in_float32(card: dict[str, Any]) -> None:
    assert select_device("auto") == GPU
    assert card["current"] == GPU
    assert not any(getattr(torch.backends.cuda.matmul, name) for name in SWITCHES)
    assert not torch.backends.cudnn.allow_tf32
    assert select_device("cuda:1") == torch.device("cuda", 1)
    assert card["current"] == torch.device("cuda", 1)


def test_a_card_that_is_not_there_is_refused(card: dict[str, Any]) -> None:
    with pytest.raises(DeviceRefused, match="cuda:2 is not there: this machine has 2 CUDA devices"):
        select_device("cuda:2")


def test_a_torch_without_cuda_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceRefused, match=r"built without CUDA.*install a CUDA build of torch"):
        select_device("cuda")


def test_a_machine_without_a_gpu_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceRefused, match="no CUDA device"):
        select_device("cuda:0")
    assert select_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_bfloat16_only_where_the_card_has_it(
    card: dict[str, Any], capability: tuple[int, int], dtype: torch.dtype
) -> None:
    card["capability"] = capability
    assert best_dtype(GPU) == dtype
    check_dtype(GPU, dtype)
    if dtype != torch.bfloat16:
        with pytest.raises(DeviceRefused, match=r"Some Card \(compute capability 7.5\) does not compute in bfloat16"):
            check_dtype(GPU, torch.bfloat16)


def test_a_cpu_is_judged_by_no_card(card: dict[str, Any]) -> None:
    card["capability"] = (7, 5)  # of a card that is there and does not compute in bfloat16
    cpu = torch.device("cpu")
    check_dtype(cpu, torch.bfloat16)
    assert best_dtype(cpu) in (torch.bfloat16, torch.float32)
    use_device(cpu)
    assert select_device("cpu") == cpu
    assert "current" not in card
    assert all(getattr(torch.backends.cuda.matmul, name) for name in SWITCHES)
