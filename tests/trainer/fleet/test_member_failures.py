"""What goes wrong in one member stays with it: the others take their step, once."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from loramux_adapters.base.load import LoadedBase
from loramux_adapters.errors import AdapterInvalid
from loramux_trainer.fleet.fleet import Fleet
from loramux_trainer.fleet.micro_batch import cut_by_tokens
from loramux_trainer.fleet.model import FleetModel, MemberRows
from loramux_trainer.fleet.torch_errors import is_out_of_memory
from loramux_trainer.losses.kto import KtoLoss
from loramux_trainer.losses.select import build_loss
from loramux_trainer.methods.galore import galore
from loramux_trainer.methods.method import Method
from loramux_trainer.optimizers.build import build_optimizer
from loramux_trainer.schema.loss_config import LossConfig
from loramux_trainer.schema.optim_config import OptimConfig
from support.fleets import lora_config, make_member, various_units


def _galore() -> Method:
    return galore(lora_config(4), 0, gap=2, rank_budget=64, tell=print)


def test_what_has_no_singular_values_any_more_diverges_alone(
    model: FleetModel, fleet_base: LoadedBase, tokenizer: Any
) -> None:
    """GaLore asks for directions of a gradient before its step, and finds it not finite."""
    units = various_units(tokenizer, 6)
    sound, broken = make_member(fleet_base, units, name="sound"), make_member(fleet_base, units, method=_galore())
    fleet = Fleet(model, token_budget=2048)
    fleet.admit(broken)
    fleet.admit(sound)
    fleet.step()
    fleet.step()
    broken.adapter.parameters.weights.fill_(1e30)
    assert fleet.step().keys() == {"sound"}
    assert broken.state == "diverged"
    assert broken.failure is not None
    assert broken.failure.startswith("step 3: ")


def test_what_has_no_predictions_to_draw_from_diverges_alone(
    model: FleetModel, fleet_base: LoadedBase, tokenizer: Any
) -> None:
    """Sophia draws labels for its Hessian."""
    units = various_units(tokenizer, 6)
    sound, broken = make_member(fleet_base, units, name="sound"), make_member(fleet_base, units)
    broken.optimizer = build_optimizer(OptimConfig(optimizer="sophia"), broken.adapter.parameters.groups)
    broken.adapter.parameters.weights.fill_(1e25)
    fleet = Fleet(model, token_budget=2048)
    fleet.admit(broken)
    fleet.admit(sound)
    assert fleet.step().keys() == {"sound"}
    assert broken.failure == "step 1: the predictions are not finite"


def test_what_cannot_be_evaluated_diverges_alone(
    model: FleetModel, fleet_base: LoadedBase, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = various_units(tokenizer, 6)
    sound, broken = (make_member(fleet_base, units, name=name, held_out=units[:2]) for name in ("sound", "broken"))

    def parts(*, with_gradients: bool) -> Any:
        raise AdapterInvalid("not finite", subject="", remedy="")

    monkeypatch.setattr(broken.adapter, "parts", parts)
    assert Fleet(model, token_budget=512).evaluate([broken, sound]).keys() == {"sound"}
    assert broken.state == "diverged"


@pytest.mark.parametrize("where", ["parts", "finish"])
def test_a_step_that_runs_out_of_memory_at_its_end_is_taken_once(
    model: FleetModel, fleet_base: LoadedBase, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    units = various_units(tokenizer, 6)
    first, second = (make_member(fleet_base, units, name=name) for name in ("first", "second"))
    fleet = Fleet(model, token_budget=2048)
    fleet.admit(first)
    fleet.admit(second)
    failed = False

    def fail_once() -> None:
        nonlocal failed
        if not failed:
            failed = True
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
            )

    if where == "parts":
        made = second.adapter.parts

        def parts(*, with_gradients: bool) -> Any:
            found = made(with_gradients=with_gradients)
            backward = found.backward
            found.backward = lambda: (fail_once(), backward())[1]
            return found

        monkeypatch.setattr(second.adapter, "parts", parts)
    else:
        finish = second.finish_step
        monkeypatch.setattr(second, "finish_step", lambda *given: (fail_once(), finish(*given))[1])
    assert fleet.step().keys() == {"first", "second"}
    assert failed
    assert (first.step, second.step) == (1, 1)


def test_a_reference_that_is_computed_before_takes_smaller_micro_batches_where_memory_is_short(
    model: FleetModel, fleet_base: LoadedBase, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And comes to the same numbers."""
    units = various_units(tokenizer, 6, pairs=True)
    loss = build_loss(LossConfig("dpo", precompute_ref_log_probs=True), max_length=512)
    roomy, tight = (make_member(fleet_base, units, name=name, loss=loss) for name in ("roomy", "tight"))
    Fleet(model, token_budget=4096).precompute_reference(roomy)
    computed = FleetModel.running

    def running(model: FleetModel, members: Sequence[MemberRows]) -> Any:
        if sum(len(each.ids) for rows in members for each in rows.sequences) > 200:
            raise torch.OutOfMemoryError("too much at once")
        return computed(model, members)

    monkeypatch.setattr(FleetModel, "running", running)
    said: list[str] = []
    Fleet(model, token_budget=4096, warn=said.append).precompute_reference(tight)
    assert said
    assert roomy.reference is not None
    assert tight.reference is not None
    cpu = torch.device("cpu")
    for index in range(len(units)):
        for one, other in zip(roomy.reference.of((index,), cpu), tight.reference.of((index,), cpu), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_want_of_memory_is_known_on_a_cpu() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("another"))


def test_chunks_have_as_many_units_as_the_loss_needs(fleet_base: LoadedBase, tokenizer: Any) -> None:
    """A prompt of KTO alone in a chunk would meet its own answer."""
    assert [s.indices(9)[:2] for s in cut_by_tokens([9, 9, 9, 9, 9], 10, 2)] == [(0, 2), (2, 5)]
    assert [s.indices(9)[:2] for s in cut_by_tokens([9], 10, 2)] == [(0, 1)]
    units = various_units(tokenizer, 9, labels=True)
    held = various_units(tokenizer, 5, labels=True)
    member = make_member(fleet_base, units, loss=KtoLoss(512), batch_size=9, chunk_tokens=1, held_out=held)
    for chunks in (member.chunks(), member.eval_chunks()):
        assert len(chunks) > 1
        assert all(len(chunk.units) >= 2 for chunk in chunks)
