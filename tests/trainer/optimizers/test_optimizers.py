"""Each optimizer of a member against the library's own on plain parameters, and states that go on bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import pytest
import pytorch_optimizer
import torch
from torch import nn

from loramux_trainer.errors import CheckpointInvalid, DeviceInvalid, JobInvalid
from loramux_trainer.optimizers.build import build_optimizer
from loramux_trainer.optimizers.devices import check_device
from loramux_trainer.optimizers.eight_bit import eight_bit_or_paged_adamw
from loramux_trainer.optimizers.hessian import gauss_newton_bartlett_estimate
from loramux_trainer.optimizers.interface import MemberOptimizer, Role
from loramux_trainer.optimizers.library import LibraryOptimizer, torch_groups
from loramux_trainer.schema.optim_config import OptimConfig

SHAPES: dict[Role, dict[str, tuple[int, ...]]] = {
    "a": {"q": (4, 24), "v": (8, 24)},
    "b": {"q": (24, 4), "v": (16, 8)},
    "vector": {"gain": (24,), "bias": (7,)},
    "embedding": {"prompt": (5, 24)},
}
RATES = [1e-2, 7e-3, 3e-3, 1e-2, 5e-3, 1e-3]
DECAY = 0.1


@dataclass(frozen=True)
class Group:
    role: Role
    flat: nn.Parameter
    views: Mapping[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor]


def make_groups(roles: tuple[Role, ...] = tuple(SHAPES)) -> list[Group]:
    generator = torch.Generator().manual_seed(0)
    groups = []
    for role in roles:
        sizes = {name: torch.Size(shape) for name, shape in SHAPES[role].items()}
        flat = nn.Parameter(torch.randn(sum(size.numel() for size in sizes.values()), generator=generator))
        flat.grad = torch.zeros_like(flat)
        cuts = [size.numel() for size in sizes.values()]
        views, gradients = (
            {name: part.view(size) for (name, size), part in zip(sizes.items(), buffer.split(cuts), strict=True)}
            for buffer in (flat.detach(), flat.grad)
        )
        groups.append(Group(role, flat, views, gradients))
    return groups


def gradients_of(groups: list[Group], step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(group.flat.shape, generator=generator) for group in groups]


def take_steps(optimizer: MemberOptimizer, groups: list[Group], steps: range) -> None:
    for step in steps:
        for group, gradient in zip(groups, gradients_of(groups, step), strict=True):
            assert group.flat.grad is not None
            group.flat.grad.copy_(gradient)
        if optimizer.needs_hessian:
            optimizer.give_hessian([gradient**2 for gradient in gradients_of(groups, step)])
        optimizer.step(RATES[step])


def by_library(
    groups: list[Group], make: Callable[[list[dict[str, Any]]], Any], ratio: float = 1.0, **step: Any
) -> list[torch.Tensor]:
    """The buffers after all steps, of separate parameters, each with its own rate and decay, in the library's hands."""
    plain = [
        {name: nn.Parameter(view.clone()) for name, view in group.views.items()} for group in groups
    ]  # fmt: skip
    optimizer = make(
        [
            {
                "params": list(each.values()),
                "weight_decay": 0.0 if group.role == "vector" else DECAY,
                "role": group.role,
            }
            for group, each in zip(groups, plain, strict=True)
        ]
    )
    for number in range(len(RATES)):
        drawn = gradients_of(groups, number)
        cut = [gradient.split([p.numel() for p in each.values()]) for gradient, each in zip(drawn, plain, strict=True)]
        for each, parts in zip(plain, cut, strict=True):
            for parameter, part in zip(each.values(), parts, strict=True):
                parameter.grad = part.view(parameter.shape).clone()
        for group in optimizer.param_groups:
            group["lr"] = RATES[number] * (ratio if group["role"] == "b" else 1.0)
        if "every" in step:
            given = [parameter.grad**2 for each in plain for parameter in each.values()]
            optimizer.step(hessian=given if number % step["every"] == 0 else None)
        else:
            optimizer.step()
    return [torch.cat([parameter.detach().flatten() for parameter in each.values()]) for each in plain]


CASES: dict[str, tuple[OptimConfig, Callable[[list[dict[str, Any]]], Any], dict[str, Any]]] = {
    "adamw": (
        OptimConfig(optimizer="adamw", betas=(0.8, 0.9), weight_decay=DECAY),
        lambda groups: torch.optim.AdamW(groups, betas=(0.8, 0.9)),
        {},
    ),
    "sgd": (
        OptimConfig(optimizer="sgd", momentum=0.9, weight_decay=DECAY),
        lambda groups: torch.optim.SGD(groups, momentum=0.9),
        {},
    ),
    "plain sgd": (OptimConfig(optimizer="sgd", weight_decay=DECAY), torch.optim.SGD, {}),
    "lion": (OptimConfig(optimizer="lion", weight_decay=DECAY), pytorch_optimizer.Lion, {}),
    "sophia": (
        OptimConfig(optimizer="sophia", hessian_update_period=2, weight_decay=DECAY),
        lambda groups: pytorch_optimizer.SophiaH(groups, update_period=2),
        {"every": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ratio", [None, 16.0])
def test_steps_are_the_librarys_own_with_rates_by_role_and_no_decay_of_vectors(case: str, ratio: float | None) -> None:
    config, make, step = CASES[case]
    expected = by_library(make_groups(), make, ratio or 1.0, **step)
    groups = make_groups()
    take_steps(build_optimizer(config, groups, loraplus_lr_ratio=ratio), groups, range(len(RATES)))
    for group, theirs in zip(groups, expected, strict=True):
        torch.testing.assert_close(group.flat.detach(), theirs, rtol=1e-6, atol=1e-6)
        assert not torch.equal(group.flat, make_groups((group.role,))[0].flat)


@pytest.mark.parametrize("ratio", [None, 16.0])
def test_muon_is_torchs_over_each_matrix_and_adamw_over_the_rest(ratio: float | None) -> None:
    config = OptimConfig(optimizer="muon", weight_decay=DECAY)
    whole = make_groups()
    matrices, rest = whole[:2], whole[2:]
    muon = by_library(
        matrices, lambda groups: torch.optim.Muon(groups, momentum=0.95, adjust_lr_fn="match_rms_adamw"), ratio or 1.0
    )
    groups = make_groups()
    take_steps(build_optimizer(config, groups, loraplus_lr_ratio=ratio), groups, range(len(RATES)))
    assert len(rest) == 2
    for group, theirs in zip(groups[:2], muon, strict=True):
        torch.testing.assert_close(group.flat.detach(), theirs, rtol=1e-6, atol=1e-6)
    alone = make_groups()
    take_steps(build_optimizer(OptimConfig(weight_decay=DECAY), alone), alone, range(len(RATES)))
    for group, theirs in zip(groups[2:], alone[2:], strict=True):
        assert torch.equal(group.flat, theirs.flat)


def test_muon_without_a_matrix_is_refused() -> None:
    with pytest.raises(JobInvalid, match=r"training\.optimizer: muon is for matrices"):
        build_optimizer(OptimConfig(optimizer="muon"), make_groups(("vector", "embedding")))


def test_a_ratio_that_nothing_has_is_refused() -> None:
    with pytest.raises(JobInvalid, match=r"lora\.loraplus_lr_ratio: this method trains no factor B"):
        build_optimizer(OptimConfig(), make_groups(("vector",)), loraplus_lr_ratio=16.0)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon", "sophia"])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_restored_optimizer_goes_on_bit_for_bit(name: Any, stop: int) -> None:
    config = OptimConfig(
        optimizer=name,
        weight_decay=DECAY,
        momentum=0.9 if name == "sgd" else None,
        hessian_update_period=2 if name == "sophia" else None,
    )
    whole = make_groups()
    take_steps(build_optimizer(config, whole), whole, range(len(RATES)))
    groups = make_groups()
    first = build_optimizer(config, groups)
    take_steps(first, groups, range(stop))
    saved = first.tensors()
    take_steps(first, groups, range(stop, stop + 1))  # what was saved is a copy
    again = make_groups()
    take_steps(build_optimizer(config, again), again, range(stop))
    second = build_optimizer(config, again)
    before = [(group.flat.detach().clone(), group.flat.grad.clone()) for group in again if group.flat.grad is not None]
    second.restore(saved)
    for group, (flat, gradient) in zip(again, before, strict=True):
        assert torch.equal(group.flat, flat)
        assert group.flat.grad is not None
        assert torch.equal(group.flat.grad, gradient)
    take_steps(second, again, range(stop, len(RATES)))
    for group, expected in zip(again, whole, strict=True):
        assert torch.equal(group.flat, expected.flat)
    assert all(tensor.device.type == "cpu" for tensor in saved.values())


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_8_bit_and_paged_are_refused_on_a_cpu_with_the_reason(name: Any) -> None:
    with pytest.raises(DeviceInvalid, match=rf"training\.optimizer: {name} needs a CUDA device \(.*on a CPU"):
        build_optimizer(OptimConfig(optimizer=name), make_groups())
    check_device(name, "cuda")
    check_device("adamw", "cpu")


def test_8_bit_states_are_8_bit_of_small_parameters_too_and_go_on_bit_for_bit() -> None:
    """bitsandbytes runs them on a CPU, where a job may not: the states and their restoring are the same code."""
    config = OptimConfig(optimizer="adamw_8bit", weight_decay=DECAY)

    def build(groups: list[Group]) -> LibraryOptimizer:
        return LibraryOptimizer(eight_bit_or_paged_adamw(config, torch_groups(groups, DECAY, None)))

    whole, groups, theirs = make_groups(), make_groups(), make_groups()
    optimizer = build(whole)
    take_steps(optimizer, whole, range(len(RATES)))
    states = [tensor for name, tensor in optimizer.tensors().items() if name.endswith("state1")]
    assert [state.dtype for state in states] == [torch.uint8] * len(whole)
    library = bitsandbytes.optim.AdamW8bit(
        [{"params": [g.flat], "weight_decay": 0.0 if g.role == "vector" else DECAY} for g in theirs], min_8bit_size=0
    )
    for step, rate in enumerate(RATES):
        for group, gradient in zip(theirs, gradients_of(theirs, step), strict=True):
            group.flat.grad = gradient
        for each in library.param_groups:
            each["lr"] = rate
        library.step()
    first = build(groups)
    take_steps(first, groups, range(3))
    second = build(groups)
    second.restore(first.tensors())
    take_steps(second, groups, range(3, len(RATES)))
    for one, two, three in zip(whole, groups, theirs, strict=True):
        assert torch.equal(one.flat, two.flat)
        assert torch.equal(one.flat, three.flat)


def test_a_state_of_another_optimizer_or_shape_is_refused() -> None:
    groups = make_groups()
    optimizer = build_optimizer(OptimConfig(), groups)
    take_steps(optimizer, groups, range(1))
    saved = optimizer.tensors()
    for config, members in (
        (OptimConfig(optimizer="lion"), make_groups()),
        (OptimConfig(), make_groups(("a", "b"))),
        (OptimConfig(), make_groups(("b", "a", "vector", "embedding"))),
    ):
        with pytest.raises(CheckpointInvalid, match="not those of this job's optimizer"):
            build_optimizer(config, members).restore(saved)


# Sophia's estimates


def test_sophia_asks_for_an_estimate_every_so_many_steps_and_takes_no_step_without() -> None:
    groups = make_groups()
    optimizer = build_optimizer(OptimConfig(optimizer="sophia", hessian_update_period=3), groups)
    asked = []
    for step in range(6):
        asked.append(optimizer.needs_hessian)
        take_steps(optimizer, groups, range(step, step + 1))
    assert asked == [True, False, False, True, False, False]
    with pytest.raises(ValueError, match="needs an estimate of the Hessian"):
        optimizer.step(1e-3)
    with pytest.raises(ValueError, match="in the shape of its buffer"):
        optimizer.give_hessian([torch.zeros(3)])
    with pytest.raises(ValueError, match="takes no estimate"):
        build_optimizer(OptimConfig(), make_groups()).give_hessian([])


def test_the_gauss_newton_bartlett_estimate_is_the_diagonal_of_a_softmax_in_the_mean() -> None:
    """Of one linear map with cross-entropy, whose Gauss-Newton matrix is its Hessian."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)

    def loss(flat: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(inputs @ flat.view(3, 4), labels)

    labels = torch.zeros(8, dtype=torch.long)
    exact = torch.autograd.functional.hessian(lambda flat: loss(flat, labels), weight.detach().flatten()).diagonal()
    total, draws = torch.zeros(12, dtype=torch.float64), 4000
    for _ in range(draws):
        drawn = torch.multinomial((inputs @ weight).softmax(-1), 1, generator=generator)[:, 0]
        [gradient] = torch.autograd.grad(loss(weight, drawn), weight)
        total += gauss_newton_bartlett_estimate(gradient, 8).flatten()
    torch.testing.assert_close(total / draws, exact, rtol=0.1, atol=0.02)
