"""Bottleneck adapters: Houlsby et al., 2019; Pfeiffer et al., 2020; beside a sub-layer: He et al., 2021.

In AdapterHub's format, by the configurations of its package 1.3 (`double_seq_bn`, `seq_bn`, `par_bn`).
"""

from __future__ import annotations

from typing import Any, Literal

from loramux_adapters.spec import BaseModelSpec
from loramux_trainer.methods.method import Method
from loramux_trainer.methods.rules import constant, kaiming_uniform, normal

BottleneckKind = Literal["houlsby", "pfeiffer", "parallel"]

_PLACES: dict[BottleneckKind, dict[str, bool]] = {
    "houlsby": {"mh_adapter": True, "output_adapter": True},
    "pfeiffer": {"mh_adapter": False, "output_adapter": True},
    "parallel": {"mh_adapter": False, "output_adapter": True},
}
_PARALLEL_SCALE = 4.0  # He et al., 2021
_NORMED_OUTPUTS = ("gemma2", "gemma3_text")


def bottleneck(
    base: BaseModelSpec,
    seed: int,
    *,
    kind: BottleneckKind,
    reduction_factor: float,
    activation: str,
    name: str = "adapter",
) -> Method:
    """Down as the package draws it ("bert": standard deviation 0.02; parallel as LoRA's A), up at zero.

    The package draws up at random too; at zero the model is unchanged at first.
    """
    is_parallel = kind == "parallel"
    inner: dict[str, Any] = {
        **_PLACES[kind],
        "is_parallel": is_parallel,
        "init_weights": "mam_adapter" if is_parallel else "bert",
        "ln_after": False,
        "ln_before": False,
        "non_linearity": activation,
        # Pfeiffer's applies the layer's own norm; where outputs are normalized the package would take another's.
        "original_ln_before": kind == "pfeiffer" and base.architecture not in _NORMED_OUTPUTS,
        "original_ln_after": True,
        "reduction_factor": reduction_factor,
        "residual_before_ln": True,
        "scaling": _PARALLEL_SCALE if is_parallel else 1.0,
    }
    config = {
        "config": inner,
        "hidden_size": base.hidden_size,
        "model_type": base.architecture,
        "name": name,  # is in the names of its tensors
        "version": "adapters.1.3.0",
    }
    rules = {
        "down.weight": kaiming_uniform("a") if is_parallel else normal(0.02, "a"),
        "down.bias": constant(0.0, "vector"),
        "up.weight": constant(0.0, "b"),
        "up.bias": constant(0.0, "vector"),
    }
    return Method(config, seed, rules)
