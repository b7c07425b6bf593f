"""How many numbers a job will train, by building its adapter in torch's fake mode: tensors have shapes and no memory.

The very code of the run builds it, so that no method has a second description here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loramux_adapters.base.load import LoadedBase
from loramux_trainer.job import TrainConfig
from loramux_trainer.methods.build import Surroundings, build_method
from loramux_trainer.methods.factors import OF_DATA, OF_WEIGHTS
from loramux_trainer.methods.rules import BaseValues
from loramux_trainer.methods.trained import TrainedAdapter
from loramux_trainer.targets import modules_of


def count_parameters(job: TrainConfig, base: LoadedBase, total_steps: int) -> int:
    """Of a job on a base, whose weights are not read: see `read_unloaded`.

    Raises JobInvalid and AdapterError where the job cannot be built.
    """
    if job.method == "prompt":  # reads rows of the embedding by their numbers, which fake tensors do not have
        return _count(job, base, total_steps)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _count(job, base, total_steps)


def _count(job: TrainConfig, base: LoadedBase, total_steps: int) -> int:
    shapes = modules_of(job, base.spec)
    values = _ValuesWithoutMemory(base)
    is_pair = job.init in (*OF_WEIGHTS, *OF_DATA) and job.init != "eva"

    def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        module, rank = base.spec.modules[name], shapes[name].rank
        return torch.empty(rank, module.in_features), torch.empty(module.out_features, rank)

    around = Surroundings(
        base,
        values,
        shapes,
        total_steps,
        tell=lambda _: None,
        pairs=pair if is_pair else None,
        components=(lambda name: pair(name)[0]) if job.init == "eva" else None,
        encode=lambda text: list(range(max(1, len(text)))),
    )
    return TrainedAdapter(build_method(job, around), base.spec, base.device).parameters.weights.numel()


class _ValuesWithoutMemory(BaseValues):
    """Values of the right shapes: one number, shown as many."""

    def bias(self, name: str) -> torch.Tensor:
        """See BaseValues."""
        return torch.zeros(()).expand(self._base.spec.modules[name].out_features)

    def weight(self, name: str) -> torch.Tensor:
        """See BaseValues."""
        module = self._base.spec.modules[name]
        shapes: Mapping[str, tuple[int, ...]] = {
            "embedding": (module.in_features, module.out_features),
            "norm": (module.out_features,),
        }
        return torch.zeros(()).expand(shapes.get(module.kind, (module.out_features, module.in_features)))
