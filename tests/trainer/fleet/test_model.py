"""The base with a fleet's modules in it: it computes what a server computes, and is the bare base at the end."""

from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.apply.batch import AdapterBatch, RowMap
from loramux_adapters.apply.inject import inject
from loramux_adapters.apply.slots import SlotTensors
from loramux_adapters.base.load import LoadedBase, load_base, refingerprint
from loramux_adapters.base.weight_formats import select_weight_formats
from loramux_adapters.embedded.tiny import tiny_path
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.writer import write_files
from loramux_adapters.formats.registry import read
from loramux_adapters.guard.examine import Examined, examine
from loramux_adapters.kernels.select import select_kernels
from loramux_trainer.data.examples import IGNORE, Example
from loramux_trainer.fleet.model import FleetModel, MemberRows
from loramux_trainer.fleet.rows import Dropout
from loramux_trainer.methods import low_rank
from loramux_trainer.methods.rules import BaseValues
from loramux_trainer.methods.trained import TrainedAdapter
from loramux_trainer.preparation import enable_activation_checkpointing
from support.adapters import files_of
from support.fleets import ALL_LINEAR, examples_of, jitter, lora_config
from support.parts import fill_slot
from support.tiny import load_tiny

TEXTS = (("lantern", "a light"), ("a somewhat longer question", "yes"), ("x", "a long answer to a short question"))


def _adapter(base: LoadedBase) -> TrainedAdapter:
    adapter = TrainedAdapter(low_rank.lora(lora_config(4), 3, BaseValues(base)), base.spec, base.device)
    jitter(adapter)
    return adapter


def _gradients(
    model: FleetModel, adapter: TrainedAdapter, examples: list[Example], dropout: Dropout | None = None
) -> torch.Tensor:
    parts = adapter.parts(with_gradients=True)
    with model.running([MemberRows(parts, tuple(examples), 0, dropout=dropout)]) as hidden:
        loss, _ = model.token_loss(hidden, torch.ones(len(hidden.targets)))
        loss.backward()  # type: ignore[no-untyped-call]
    parts.backward()
    found = adapter.parameters.gradients.clone()
    adapter.parameters.clear()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 5, 40, 300])
def test_a_module_computes_in_training_what_it_computes_in_serving(
    tokens: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Bit for bit, for the adapter that the training exports: the same product, the same kernels, the same rounding."""
    training, serving = (load_base(tiny_path(), compute_dtype=dtype) for _ in range(2))
    adapter = _adapter(training)
    names = [name for name in training.spec.modules if name.rpartition(".")[2] in ALL_LINEAR]
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    example = Example(tuple(torch.arange(tokens).remainder(200).tolist()), (IGNORE,) * (tokens - 1) + (7,))
    config, tensors = adapter.files()
    write_files(tmp_path, config, tensors, training.spec.fingerprint, weights_file=adapter.layout.weights_file)
    with FleetModel(training, examine(training, 512)) as model, torch.no_grad():
        for name in names:
            _watch(training.model.get_submodule(name), name, seen)
        with model.running([MemberRows(adapter.parts(with_gradients=False), (example,), 0)]):
            pass
    weights = read(files_of(tmp_path), serving.spec, ReadLimits())
    formats = select_weight_formats(serving.device, dtype, dense=False, invariant=False)
    adapted = inject(serving, capacity=8, weight_formats=formats)
    fill_slot(SlotTensors(adapted), 0, weights, dict.fromkeys(names, (0, 8)))
    kernels = select_kernels(deterministic=False, device=serving.device, dtype=dtype)
    maps = (RowMap([0] * tokens, kernels, serving.device, adapted.slot_kinds) for _ in range(2))
    with torch.inference_mode(), adapted.cell.running(AdapterBatch(*maps)):
        for group in adapted.groups:  # siblings must be given one tensor
            if group.members[0] in seen:
                x = seen[group.members[0]][0]
                for name in group.members:
                    assert torch.equal(seen[name][0], x), name
                    assert torch.equal(adapted.model.get_submodule(name)(x), seen[name][1]), name


def _watch(module: Any, name: str, seen: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    forward = module.forward

    def watched(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = forward(x)
        seen[name] = (x.clone(), y.clone())
        return y

    module.forward = watched


def test_what_is_computed_together_is_what_is_computed_alone(
    model: FleetModel, fleet_base: LoadedBase, tokenizer: Any
) -> None:
    adapter, examples = _adapter(fleet_base), examples_of(tokenizer, TEXTS)
    together = _gradients(model, adapter, examples)
    alone = sum((_gradients(model, adapter, [example]) for example in examples), torch.zeros_like(together))
    torch.testing.assert_close(together, alone, atol=2e-5 * float(alone.abs().max()), rtol=0)


def test_activation_checkpointing_gives_the_same_gradients(tokenizer: Any) -> None:
    """Dropout draws the same masks when a layer is computed again."""
    base, results = load_tiny(), []
    examples, adapter = examples_of(tokenizer, TEXTS), _adapter(base)
    for checkpointing in (False, True):
        if checkpointing:
            enable_activation_checkpointing(base.model)
        with FleetModel(base, examine(base, 512)) as model:
            results.append(_gradients(model, adapter, examples, Dropout(0.2, "a seed")))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)
    with FleetModel(base, examine(base, 512)) as model:
        other = _gradients(model, adapter, examples, Dropout(0.2, "another"))
    assert (other - results[0]).abs().max() > 1e-3


def test_frozen_products_in_bf16_cost_little_of_the_gradient(
    fleet_base: LoadedBase, examined: Examined, tokenizer: Any
) -> None:
    adapter, examples = _adapter(fleet_base), examples_of(tokenizer, TEXTS)
    found = []
    for products in (None, torch.bfloat16):
        with FleetModel(fleet_base, examined, frozen_products=products) as model:
            found.append(_gradients(model, adapter, examples))
    exact, rounded = found
    assert 0 < float(torch.dist(exact, rounded) / exact.norm()) < 0.03
    assert float(torch.nn.functional.cosine_similarity(exact, rounded, dim=0)) > 0.999


def test_at_the_end_the_base_is_the_bare_base_again(tokenizer: Any) -> None:
    base = load_tiny()
    ids = torch.tensor([tokenizer.encode("any text at all")])
    with torch.no_grad():
        before = base.model(input_ids=ids).logits
        attention = base.model.config._attn_implementation
        with FleetModel(base, examine(base, 512)):
            assert base.model.config._attn_implementation != attention
        assert torch.equal(base.model(input_ids=ids).logits, before)
    assert base.model.config._attn_implementation == attention
    assert refingerprint(base) == base.spec.fingerprint
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_a_failed_forward_leaves_nothing_behind(model: FleetModel, fleet_base: LoadedBase, tokenizer: Any) -> None:
    adapter, examples = _adapter(fleet_base), examples_of(tokenizer, TEXTS)
    expected = _gradients(model, adapter, examples)
    broken = Example((1, 10**6, 2), (IGNORE, IGNORE, 2))  # no such token
    with pytest.raises(IndexError), model.running([MemberRows(None, (broken,), -1)]):
        pass
    assert torch.equal(_gradients(model, adapter, examples), expected)
