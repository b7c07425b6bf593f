"""The loop's loss and gradients against PEFT's LoRA on the same NF4 base and batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from loramux_adapters.apply.batch import AdapterBatch, RowMap
from loramux_adapters.apply.inject import inject
from loramux_adapters.apply.slots import SlotTensors
from loramux_adapters.apply.trainable import TrainableAdapter, attach
from loramux_adapters.base.bitsandbytes_compat import Linear4bit
from loramux_adapters.base.frozen import Nf4Linear, logical_nf4
from loramux_adapters.base.load import LoadedBase, load_base
from loramux_adapters.base.weight_formats import select_weight_formats
from loramux_adapters.embedded.tiny import tiny_path
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.writer import TrainedModule, write_peft
from loramux_adapters.formats.registry import read
from loramux_adapters.kernels.select import select_kernels
from loramux_trainer.batches import Batch, collate
from loramux_trainer.completion_loss import completion_loss
from loramux_trainer.errors import JobInvalid
from loramux_trainer.examples import IGNORE, Example
from loramux_trainer.records import parse_record
from loramux_trainer.run import enable_activation_checkpointing
from loramux_trainer.targets import resolve_targets
from support.adapters import files_of
from support.parts import fill_slot
from support.tiny import conversation, load_tiny, tiny_encoder

TEXTS = (("lantern", "a light"), ("a somewhat longer question", "yes"), ("x", "a long answer to a short question"))


@pytest.fixture
def examples(tokenizer: Any) -> list[Example]:
    encoder = tiny_encoder(tokenizer)
    return [example for pair in TEXTS for example in encoder.encode(parse_record({"messages": conversation(*pair)}))]


@pytest.fixture
def batch(examples: list[Example]) -> Batch:
    return collate(examples, pad_id=0, device=torch.device("cpu"))


@pytest.fixture
def adapter(base: LoadedBase) -> Iterator[TrainableAdapter]:
    with _attached(base) as attached:
        yield attached


def _attached(base: LoadedBase, dropout: float = 0.0) -> TrainableAdapter:
    names = resolve_targets("all-linear", base.spec)
    adapter = attach(base, dict.fromkeys(names, 4), scales=dict.fromkeys(names, 2.0), dropout=dropout, seed=3)
    # B away from its zero, so that A has gradients too.
    adapter.load_state({name: (a, 0.02 * torch.randn_like(b)) for name, (a, b) in adapter.state().items()})
    return adapter


def _gradients(adapter: TrainableAdapter) -> list[torch.Tensor]:
    gradients = [parameter.grad for parameter in adapter.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [gradient.clone() for gradient in gradients if gradient is not None]


def test_loss_and_gradients_equal_peft(base: LoadedBase, adapter: TrainableAdapter, batch: Batch) -> None:
    loss = completion_loss(base.model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    ours = dict(zip(sorted(adapter.state()), zip(*[iter(_gradients(adapter))] * 2, strict=True), strict=True))

    # In float64 on the dequantized weights: two float32 computations in other orders differ as both do from this one.
    plain = load_tiny().model
    _dequantize(plain)
    targets = sorted({name.rpartition(".")[2] for name in adapter.state()})
    model = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    torch.nn.Module.to(model, torch.float64)
    with torch.no_grad():
        for name, (a, b) in adapter.state().items():
            layer = model.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    theirs = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss * batch.supervised
    theirs.backward()

    torch.testing.assert_close(loss, theirs.float(), atol=1e-4, rtol=1e-5)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(ours)
    for name, gradients in ours.items():
        layer = model.base_model.model.get_submodule(name)
        for ours_, theirs_ in zip(gradients, (layer.lora_A["default"], layer.lora_B["default"]), strict=True):
            exact = theirs_.weight.grad
            # Of the largest gradient; 1e-5 was measured of ours, and of PEFT's own in float32.
            torch.testing.assert_close(ours_.double(), exact, atol=3e-5 * float(exact.abs().max()), rtol=0)


def test_gradients_are_those_on_the_dequantized_weights(batch: Batch) -> None:
    """The backward pass multiplies by the weights that the forward pass multiplied by, whatever dtype they came in."""
    results = []
    for dequantized in (False, True):
        base = load_tiny()
        if dequantized:
            _dequantize(base.model)
        torch.manual_seed(5)
        with _attached(base) as adapter:
            completion_loss(base.model, batch).backward()  # type: ignore[no-untyped-call]
            results.append(_gradients(adapter))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-5 * float(exact.abs().max()), rtol=0)


def _dequantize(model: torch.nn.Module) -> None:
    for name, module in [pair for pair in model.named_modules() if isinstance(pair[1], Linear4bit)]:
        plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        frozen = Nf4Linear(*logical_nf4(module), None, torch.float32)
        plain.weight = torch.nn.Parameter(frozen.dequantize(torch.float32), requires_grad=False)
        if module.bias is not None:
            plain.bias = module.bias
        model.set_submodule(name, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 5, 40, 300])
def test_a_module_computes_in_training_what_it_computes_in_serving(
    rows: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Bit for bit, for the adapter that the training exports: the same product, the same kernels, the same rounding."""
    training, serving = (load_base(tiny_path(), compute_dtype=dtype) for _ in range(2))
    inputs = {name: torch.randn(rows, spec.in_features).to(dtype) for name, spec in training.spec.modules.items()}
    with _attached(training) as adapter:
        adapter.train(False)
        names = sorted(adapter.state())
        trained = {name: training.model.get_submodule(name)(inputs[name][None])[0].detach() for name in names}
        modules = {name: TrainedModule(a, b, 8) for name, (a, b) in adapter.state().items()}
        write_peft(tmp_path, modules, training.spec, use_rslora=False)
    weights = read(files_of(tmp_path), serving.spec, ReadLimits())
    formats = select_weight_formats(serving.device, dtype, dense=False, invariant=False)
    adapted = inject(serving, capacity=8, weight_formats=formats, stack=False)
    fill_slot(SlotTensors(adapted), 0, weights, dict.fromkeys(names, (0, 8)))
    kernels = select_kernels(deterministic=False, device=serving.device, dtype=dtype)
    maps = (RowMap([0] * rows, kernels, serving.device, adapted.slot_kinds) for _ in range(2))
    with torch.inference_mode(), adapted.cell.running(AdapterBatch(*maps)):
        for name in names:
            served = adapted.model.get_submodule(name)(inputs[name][None])[0]
            assert torch.equal(served, trained[name]), name


def test_padding_and_batching_change_nothing(
    base: LoadedBase, adapter: TrainableAdapter, batch: Batch, examples: list[Example]
) -> None:
    together = completion_loss(base.model, batch)
    together.backward()  # type: ignore[no-untyped-call]
    batched = _gradients(adapter)
    for parameter in adapter.parameters():
        parameter.grad = None
    alone = torch.zeros(())
    for example in examples:
        loss = completion_loss(base.model, collate([example], pad_id=0, device=torch.device("cpu")))
        loss.backward()  # type: ignore[no-untyped-call]
        alone += loss.detach()
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-5)
    for one, other in zip(batched, _gradients(adapter), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_prompt_tokens_carry_no_loss(base: LoadedBase, examples: list[Example]) -> None:
    example = examples[0]
    logits = base.model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
    expected = -sum(logits[position, label] for position, label in enumerate(example.labels[1:]) if label != IGNORE)
    with torch.no_grad():
        loss = completion_loss(base.model, collate([example], pad_id=0, device=torch.device("cpu")))
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients(batch: Batch) -> None:
    base, results = load_tiny(), []
    for checkpointing in (False, True):
        if checkpointing:
            enable_activation_checkpointing(base.model)
        torch.manual_seed(0)
        with _attached(base, dropout=0.2) as adapter:
            torch.manual_seed(1)
            completion_loss(base.model, batch).backward()  # type: ignore[no-untyped-call]
            results.append(_gradients(adapter))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-5, rtol=1e-5)


def test_detaching_gives_the_bare_base_back(base: LoadedBase, batch: Batch) -> None:
    with torch.no_grad():
        before = completion_loss(base.model, batch)
        with _attached(base):
            assert completion_loss(base.model, batch) != before
        assert completion_loss(base.model, batch) == before
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_a_fresh_adapter_changes_nothing_and_starts_as_peft_does(base: LoadedBase, batch: Batch) -> None:
    names = resolve_targets(("q_proj", "down_proj"), base.spec)
    with torch.no_grad():
        before = completion_loss(base.model, batch)
        with attach(base, dict.fromkeys(names, 8), scales=dict.fromkeys(names, 2.0), seed=1) as fresh:
            assert completion_loss(base.model, batch) == before
            for name, (a, b) in fresh.state().items():
                bound = base.spec.modules[name].in_features ** -0.5
                assert a.abs().max() <= bound
                assert a.std() == pytest.approx(bound / 3**0.5, rel=0.1)
                assert not b.any()


def test_all_linear_is_the_set_that_peft_chooses(base: LoadedBase) -> None:
    model = get_peft_model(load_tiny().model, LoraConfig(r=4, target_modules="all-linear"))
    theirs = {
        name.removesuffix(".lora_A.default")
        for name, _ in model.base_model.model.named_modules()
        if name.endswith(".lora_A.default")
    }
    assert set(resolve_targets("all-linear", base.spec)) == theirs


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (("q_proj", "z_proj"), "z_proj names no module"),
        (r".*\.z_proj", "matches no module"),
        ("(", "not a regular expression"),
        (("embed_tokens",), "not a linear map"),
    ],
)
def test_targets_that_choose_nothing_sensible_are_refused(base: LoadedBase, targets: Any, says: str) -> None:
    with pytest.raises(JobInvalid, match=says):
        resolve_targets(targets, base.spec)


def test_a_regular_expression_matches_whole_names(base: LoadedBase) -> None:
    chosen = resolve_targets(r"model\.layers\.[01]\.self_attn\.[qv]_proj", base.spec)
    assert chosen == tuple(f"model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qv")


def test_attach_refuses_what_is_no_linear_map(base: LoadedBase) -> None:
    with pytest.raises(AdapterIncompatible, match=r"model\.norm is not a linear map"):
        attach(base, {"model.norm": 4}, scales={"model.norm": 1.0})
