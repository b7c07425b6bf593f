"""Initializations that move the base in PEFT, beside it here: first values, first logits, and whole trajectories."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

from loramux_adapters.base.load import LoadedBase, refingerprint
from loramux_trainer.data.examples import Example
from loramux_trainer.fleet.model import FleetModel, MemberRows
from loramux_trainer.fleet.parts import StepParts
from loramux_trainer.fleet.statistics import input_moments, weight_gradients
from loramux_trainer.methods import initial_pairs, low_rank
from loramux_trainer.methods.delta import delta_lora
from loramux_trainer.methods.initial_pairs import Pair
from loramux_trainer.methods.rules import BaseValues
from loramux_trainer.methods.trained import TrainedAdapter
from support.fleets import ALL_LINEAR, dequantize, examples_of, lora_config, summed_loss
from support.tiny import load_tiny

TEXTS = (("lantern", "a light"), ("a somewhat longer question", "yes"), ("x", "a long answer to a short question"))
RANK, ALPHA = 4, 6
SCALE = ALPHA / RANK
CONFIG = lora_config(RANK, lora_alpha=ALPHA)


@pytest.fixture
def examples(tokenizer: Any) -> list[Example]:
    return examples_of(tokenizer, TEXTS)


def _adapter(base: LoadedBase, pair_of: Callable[[str], Pair]) -> TrainedAdapter:
    return TrainedAdapter(delta_lora(CONFIG, 0, BaseValues(base), pair_of), base.spec, base.device)


def _lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=ALL_LINEAR, task_type="CAUSAL_LM", **options)


def _peft(**options: Any) -> Any:
    """PEFT's LoRA on the dequantized base, in float32."""
    plain = load_tiny().model
    dequantize(plain)
    return get_peft_model(plain, _lora(**options))


def _factors(peft: Any, name: str) -> Pair:
    layer = peft.base_model.model.get_submodule(name)
    return layer.lora_A["default"].weight.detach().float(), layer.lora_B["default"].weight.detach().float()


def _steps(model: FleetModel, adapter: TrainedAdapter, examples: Sequence[Example], count: int) -> None:
    """Plain gradient descent on the sum over tokens."""
    for _ in range(count):
        parts = adapter.parts(with_gradients=True)
        with model.running([MemberRows(parts, tuple(examples), 0)]) as hidden:
            loss, _ = model.token_loss(hidden, torch.ones(len(hidden.targets)))
            loss.backward()  # type: ignore[no-untyped-call]
        parts.backward()
        adapter.parameters.weights.sub_(adapter.parameters.gradients, alpha=1e-3)
        adapter.parameters.clear()


def _peft_steps(peft: Any, examples: Sequence[Example], count: int) -> None:
    torch.nn.Module.to(peft, torch.float64)
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    for _ in range(count):
        for parameter in trained:
            parameter.grad = None
        summed_loss(peft, examples).backward()
        with torch.no_grad():
            for parameter in trained:
                parameter.sub_(parameter.grad, alpha=1e-3)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_trajectory_is_peft_s(
    init: str, model: FleetModel, fleet_base: LoadedBase, examples: list[Example]
) -> None:
    """Nine steps, on the base as it is here and on the moved one there."""
    values = BaseValues(fleet_base)

    def pair_of(name: str) -> Pair:
        weight = values.weight(name)
        return initial_pairs.pissa(weight, RANK, SCALE) if init == "pissa" else initial_pairs.olora(weight, RANK)

    adapter = _adapter(fleet_base, pair_of)
    peft = _peft(init_lora_weights=init)
    names = _all_linear(fleet_base)
    for name in names:
        for ours, theirs in zip(pair_of(name), _factors(peft, name), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        with model.running([MemberRows(None, tuple(examples), 0)]) as hidden:
            bare = model.log_probs(hidden)
        with model.running([MemberRows(adapter.parts(with_gradients=False), tuple(examples), 0)]) as hidden:
            torch.testing.assert_close(model.log_probs(hidden), bare, atol=1e-5, rtol=1e-5)
    _steps(model, adapter, examples, 9)
    _peft_steps(peft, examples, 9)
    moved = 0.0
    for name in names:
        for role, theirs in zip("ab", _factors(peft, name), strict=True):
            ours = adapter.parameters.views[f"{name}:{role}:trained"]
            torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)
            moved = max(moved, float((ours - pair_of(name)[role == "b"]).abs().max()))
    assert moved > 1e-3
    assert refingerprint(fleet_base) == fleet_base.spec.fingerprint


def _all_linear(base: LoadedBase) -> list[str]:
    return [name for name in base.spec.modules if name.rpartition(".")[2] in ALL_LINEAR]


def _exact_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the random approximation that PEFT takes: a trajectory is then a function of the data."""

    def svd(matrix: torch.Tensor, q: int = 6, **_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return u[:, :q].float(), s[:q].float(), vh[:q].T.float()

    monkeypatch.setattr(torch, "svd_lowrank", svd)


def _aligned(ours: torch.Tensor, theirs: torch.Tensor, *, off: float) -> torch.Tensor:
    """Rows with the signs of theirs, which singular vectors leave open; they are the same but for that."""
    signed = ours * (ours * theirs).sum(1, keepdim=True).sign()
    assert float(torch.dist(signed, theirs) / theirs.norm()) < off
    return signed


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # PEFT counts backward passes by such hooks
def test_the_trajectory_of_lora_ga_is_peft_s(
    model: FleetModel, fleet_base: LoadedBase, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of NF4 weights here, of their values in float32 there; then nine steps on the base as it is."""
    _exact_svd(monkeypatch)
    plain = load_tiny().model
    dequantize(plain)
    config = _lora(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    tokens = sum(example.supervised for example in examples)
    preprocess_loraga(plain, config, lambda: (summed_loss(plain, examples) / tokens).backward())
    peft = get_peft_model(plain, config)
    names = _all_linear(fleet_base)

    def backward(members: list[MemberRows]) -> None:
        with model.running(members) as hidden:
            # PEFT's are means over the backward passes of a module.
            loss, _ = model.token_loss(hidden, torch.full((len(hidden.targets),), 1 / tokens / len(examples)))
            loss.backward()  # type: ignore[no-untyped-call]

    rows = [[MemberRows(StepParts({}), (example,), 0)] for example in examples]
    gradients = weight_gradients(model, names, lambda: rows, backward)

    def pair_of(name: str) -> Pair:
        a, b = initial_pairs.lora_ga(gradients[name], RANK)
        theirs_a, theirs_b = _factors(peft, name)
        return _aligned(a, theirs_a, off=1e-3), _aligned(b.T, theirs_b.T, off=1e-3).T.contiguous()

    begun = {name: pair_of(name) for name in names}
    adapter = _adapter(fleet_base, begun.__getitem__)
    _steps(model, adapter, examples, 9)
    _peft_steps(peft, examples, 9)
    _assert_same_pairs(adapter, peft, begun, suffix=":trained", off=1e-3)
    assert refingerprint(fleet_base) == fleet_base.spec.fingerprint


@pytest.mark.filterwarnings("ignore:lora with eva initialization")  # it says what is to be called next
def test_the_trajectory_of_eva_is_peft_s(
    model: FleetModel, fleet_base: LoadedBase, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks are not spread anew between modules (rho 1), which Loramux does not do."""
    _exact_svd(monkeypatch)
    peft = _peft(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, use_label_mask=False))
    longest = max(len(example.ids) for example in examples)
    ids = torch.tensor([[*example.ids, *[0] * (longest - len(example.ids))] for example in examples])
    mask = torch.tensor([[int(i < len(example.ids)) for i in range(longest)] for example in examples])
    batch = {"input_ids": ids, "attention_mask": mask}
    initialize_lora_eva_weights(peft, [batch], show_progress_bar=False)
    names = _all_linear(fleet_base)
    moments = input_moments(model, names, lambda: [[MemberRows(None, tuple(examples), 0)]])

    def components(name: str) -> torch.Tensor:
        own = moments[name]
        found = initial_pairs.eva((own.squares / own.count).cpu(), (own.total / own.count).cpu(), RANK)
        return _aligned(found, _factors(peft, name)[0], off=1e-2)

    begun = {name: (components(name), torch.zeros_like(_factors(peft, name)[1])) for name in names}
    method = low_rank.eva(CONFIG, 0, BaseValues(fleet_base), lambda name: begun[name][0])
    adapter = TrainedAdapter(method, fleet_base.spec, fleet_base.device)
    _steps(model, adapter, examples, 9)
    _peft_steps(peft, examples, 9)
    _assert_same_pairs(adapter, peft, begun, suffix="", off=1e-2)


def _assert_same_pairs(
    adapter: TrainedAdapter, peft: Any, begun: Mapping[str, Pair], *, suffix: str, off: float
) -> None:
    """By the distance that each factor is off, over what it moved."""
    moved = 0.0
    for name, pair in begun.items():
        for role, theirs, first in zip("ab", _factors(peft, name), pair, strict=True):
            ours = adapter.parameters.views[f"{name}:{role}{suffix}"]
            assert float(torch.dist(ours, theirs) / theirs.norm()) < off, f"{name} {role}"
            moved = max(moved, float(torch.dist(ours, first) / ours.norm()))
    assert moved > 10 * off


def test_the_export_is_a_lora_of_twice_the_rank(
    model: FleetModel, fleet_base: LoadedBase, examples: list[Example], tmp_path: Path
) -> None:
    values = BaseValues(fleet_base)
    adapter = _adapter(fleet_base, lambda name: initial_pairs.olora(values.weight(name), RANK))
    _steps(model, adapter, examples, 2)
    config, tensors = adapter.files()
    assert config["r"] == 2 * RANK
    assert config["lora_alpha"] / config["r"] == SCALE
    assert {min(tensor.shape) for tensor in tensors.values()} == {2 * RANK}


def test_corda_is_peft_s(model: FleetModel, fleet_base: LoadedBase, examples: list[Example]) -> None:
    """The product of the pair: its factors have no sign of their own."""
    plain = load_tiny().model
    dequantize(plain)
    config = _lora(init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))

    def run() -> None:
        with torch.no_grad():
            for example in examples:
                plain(input_ids=torch.tensor([example.ids]))

    preprocess_corda(plain, config, run_model=run)
    peft = get_peft_model(plain, config)
    names = _all_linear(fleet_base)
    batches = [[MemberRows(None, (example,), 0)] for example in examples]
    moments = input_moments(model, names, lambda: batches)
    values = BaseValues(fleet_base)
    for name in names:
        covariance = moments[name].scaled / moments[name].batches
        a, b = initial_pairs.corda(values.weight(name), covariance, RANK, SCALE)
        theirs_a, theirs_b = _factors(peft, name)
        # In norm, with as much as float32 itself is off: the covariance of few tokens is hardly invertible.
        exact_a, exact_b = initial_pairs.corda(values.weight(name).double(), covariance.double(), RANK, SCALE)
        exact = (exact_b @ exact_a).float()
        ours_off, theirs_off = (float(torch.dist(each, exact) / exact.norm()) for each in (b @ a, theirs_b @ theirs_a))
        assert max(ours_off, theirs_off) < 0.01, name


def test_moments_are_those_of_the_inputs(model: FleetModel, fleet_base: LoadedBase, examples: list[Example]) -> None:
    name = next(name for name in fleet_base.spec.modules if name.endswith("down_proj"))
    seen: list[torch.Tensor] = []
    batches = [[MemberRows(None, (example,), 0)] for example in examples]
    moments = input_moments(model, [name], lambda: batches)[name]
    plain = load_tiny().model
    dequantize(plain)
    plain.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0][0]))
    with torch.no_grad():
        for example in examples:
            plain(input_ids=torch.tensor([example.ids]))
    x = torch.cat(seen)
    assert moments.count == len(x)
    torch.testing.assert_close(moments.total, x.sum(0), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(moments.squares, x.T @ x, atol=1e-3, rtol=1e-4)
    centered = x - x.mean(0)
    a = initial_pairs.eva(moments.squares / len(x), moments.total / len(x), RANK)
    _, _, vh = torch.linalg.svd(centered, full_matrices=False)
    torch.testing.assert_close((a @ vh[:RANK].T).abs(), torch.eye(RANK), atol=1e-2, rtol=0)


def test_gradients_of_frozen_weights_are_those_of_plain_ones(
    model: FleetModel, fleet_base: LoadedBase, examples: list[Example]
) -> None:
    """In several passes where memory for all at once is short; and what LoRA-GA begins from."""
    names = [name for name in fleet_base.spec.modules if name.rpartition(".")[2] in ("q_proj", "v_proj", "down_proj")]
    passes: list[int] = []

    def batches() -> list[list[MemberRows]]:
        passes.append(1)
        return [[MemberRows(StepParts({}), (example,), 0)] for example in examples]

    def backward(members: list[MemberRows]) -> None:
        with model.running(members) as hidden:
            loss, _ = model.token_loss(hidden, torch.ones(len(hidden.targets)))
            loss.backward()  # type: ignore[no-untyped-call]

    gradients = weight_gradients(model, names, batches, backward, most_bytes=1 << 18)
    assert len(passes) > 1
    plain = load_tiny().model
    dequantize(plain)
    torch.nn.Module.to(plain, torch.float64).requires_grad_(True)
    summed_loss(plain, examples).backward()
    for name in names:
        exact = plain.get_submodule(name).weight.grad
        torch.testing.assert_close(gradients[name].double(), exact, atol=4e-5 * float(exact.abs().max()), rtol=0)
    a, b = initial_pairs.lora_ga(gradients[names[0]], RANK)
    u, s, vh = torch.linalg.svd(gradients[names[0]].double(), full_matrices=False)
    torch.testing.assert_close((a.double() @ vh[:RANK].T).abs(), torch.eye(RANK).double(), atol=1e-3, rtol=0)
    factor = gradients[names[0]].shape[0] ** 0.25 / 4.0
    torch.testing.assert_close(b.double().norm(dim=0), s[RANK : 2 * RANK] * factor, rtol=1e-3, atol=1e-6)
    assert (b.double().T @ u[:, :RANK]).abs().max() < 1e-3 * float(b.norm())
