"""Factors that an initialization makes of the base, or of what training data does to it, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from loramux_trainer.data.examples import Example
from loramux_trainer.errors import JobInvalid
from loramux_trainer.fleet.model import FleetModel, MemberRows
from loramux_trainer.fleet.parts import StepParts
from loramux_trainer.fleet.statistics import InputMoments, input_moments, weight_gradients
from loramux_trainer.methods import initial_pairs
from loramux_trainer.methods.initial_pairs import Pair
from loramux_trainer.methods.rules import BaseValues
from loramux_trainer.targets import ModuleShape

OF_WEIGHTS = ("pissa", "olora")
"""Initializations that look at the weight alone."""
OF_DATA = ("eva", "corda", "lora-ga")
"""Those that run training data through the base."""


class Factors:
    """What one job's initialization gives each module. `batches` are sequences of its training data."""

    def __init__(
        self,
        init: str,
        model: FleetModel,
        values: BaseValues,
        shapes: Mapping[str, ModuleShape],
        batches: Sequence[Sequence[Example]],
    ) -> None:
        self._init, self._values, self._shapes = init, values, shapes
        rows = [[MemberRows(StepParts({}), tuple(batch), 0)] for batch in batches]
        self._moments: Mapping[str, InputMoments] = {}
        self._gradients: Mapping[str, torch.Tensor] = {}
        if init in ("eva", "corda"):
            self._moments = input_moments(model, tuple(shapes), lambda: rows)
        elif init == "lora-ga":
            tokens = sum(example.supervised for batch in batches for example in batch)
            self._gradients = weight_gradients(model, tuple(shapes), lambda: rows, _mean_loss_of(model, tokens))

    def pair(self, module: str) -> Pair:
        """A [r, in] and B [out, r]. Raises JobInvalid where the module is too small for the rank."""
        shape, weight = self._shapes[module], self._values.weight(module)
        self._check_rank(module, shape.rank, min(weight.shape))
        if self._init == "pissa":
            return initial_pairs.pissa(weight, shape.rank, shape.scale)
        if self._init == "olora":
            return initial_pairs.olora(weight, shape.rank)
        if self._init == "corda":
            moments = self._moments[module]
            covariance = (moments.scaled / moments.batches).cpu()
            return initial_pairs.corda(weight, covariance, shape.rank, shape.scale)
        return initial_pairs.lora_ga(self._gradients[module], shape.rank)

    def components(self, module: str) -> torch.Tensor:
        """A [r, in] of eva."""
        moments, rank = self._moments[module], self._shapes[module].rank
        self._check_rank(module, rank, min(len(moments.total), moments.count))
        second, mean = (moments.squares / moments.count).cpu(), (moments.total / moments.count).cpu()
        return initial_pairs.eva(second, mean, rank)

    def _check_rank(self, module: str, rank: int, most: int) -> None:
        if rank > most:
            raise JobInvalid(
                "lora.rank", f"{rank} is more than the {most} directions that init {self._init} finds at {module}"
            )


def _mean_loss_of(model: FleetModel, tokens: int) -> Callable[[Sequence[MemberRows]], None]:
    def run(members: Sequence[MemberRows]) -> None:
        with model.running(members) as hidden:
            weights = torch.full((len(hidden.targets),), 1.0 / tokens, device=hidden.states.device)
            loss, _ = model.token_loss(hidden, weights)
            loss.backward()  # type: ignore[no-untyped-call]

    return run
