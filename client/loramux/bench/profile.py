"""Where a decode step's milliseconds go: the engine's own clock for its parts, torch's profiler for operations.

Runs apart from the measurement, since a profiler slows what it watches.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loramux.bench.engine_driver import EngineDriver
from loramux.bench.marks import marked_kernels, split_mark
from loramux.bench.session import send
from loramux.bench.workload import Scenario, Workload
from loramux_server.engine.stats import StepStats
from loramux_server.observe.metrics import Metrics

PARTS = ("plan", "prepare", "forward", "sample", "commit", "publish")
MOST_PROFILED_STEPS = 16
UNSEEN = "not seen by the profiler (Python, waiting)"

# First match wins; an operation of no group is "other". Names as torch gives them.
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("NF4 products", ("bitsandbytes::", "loramux::nf4_product")),
    ("low-rank products", ("loramux::low_rank",)),
    ("attention of decode rows", ("loramux::decode_attention",)),
    ("matrix products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul",
                         "aten::einsum", "mkldnn::", "onednn::", "loramux::dense_product")),
    ("fused attention and softmax", ("aten::scaled_dot", "aten::_scaled_dot", "aten::softmax", "aten::_softmax",
                                     "aten::_safe_softmax")),
    ("gather and scatter", ("aten::index", "aten::_index", "aten::gather", "aten::scatter", "aten::embedding",
                            "aten::take", "aten::masked", "aten::where")),
    ("copies and casts", ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous", "aten::cat",
                          "aten::stack", "aten::pad", "aten::constant_pad")),
    ("choice of tokens", ("aten::argmax", "aten::topk", "aten::sort", "aten::max", "aten::log_softmax",
                          "aten::_log_softmax", "aten::logsumexp", "aten::multinomial")),
    ("views and allocation", ("aten::view", "aten::reshape", "aten::as_strided", "aten::transpose", "aten::slice",
                              "aten::select", "aten::empty", "aten::zeros", "aten::unsqueeze", "aten::expand",
                              "aten::permute", "aten::t", "aten::split", "aten::narrow", "aten::resize", "aten::fill",
                              "aten::zero_", "aten::detach", "aten::squeeze", "aten::unbind", "aten::_unsafe_view",
                              "aten::_reshape_alias", "aten::unflatten", "aten::flatten", "aten::chunk")),
    ("elementwise and norms", ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::silu", "aten::gelu",
                               "aten::pow", "aten::mean", "aten::rsqrt", "aten::neg", "aten::cos", "aten::sin",
                               "aten::sum", "aten::rms_norm", "aten::_fused_rms_norm", "aten::native_layer_norm")),
)  # fmt: skip


@dataclass(frozen=True)
class OperationShare:
    """One operation at one set of input shapes; self time per step."""

    operation: str
    shapes: str
    calls: float
    milliseconds: float


@dataclass(frozen=True)
class StepProfile:
    """Milliseconds of one decode step with all requests in it.

    `parts` are medians without a profiler, per scenario; `groups` and `operations` come from the profiled widest one,
    whose own parts are `profiled`. The groups together are the whole step: one is what the profiler does not see.
    """

    rows: int
    scenario: str
    parts: Mapping[str, Mapping[str, float]]
    steps: Mapping[str, int]
    groups: Mapping[str, float]
    operations: Sequence[OperationShare]
    profiled: Mapping[str, float]


class StepRecorder(Metrics):
    """Metrics that also keep the times of full decode steps, and can profile a run of them on the engine thread."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows
        self.steps: list[StepStats] = []
        self.events: Any = None
        self._wanted = 0
        self._profiler: Any = None
        self._left = 0
        self.profiled = 0  # steps that `events` cover

    def profile_next(self, steps: int) -> None:
        """Profile the next `steps` full decode steps, once."""
        self._wanted = steps

    def step(self, stats: StepStats) -> None:
        """Called by the engine after every step, on its thread: the profiler sees the thread that starts it."""
        super().step(stats)
        full = stats.decode_chunks == self._rows and stats.prefill_chunks == 0
        if full:
            self.steps.append(stats)
        if self._profiler is not None:
            self.profiled += 1
            self._left -= 1
            if self._left == 0 or not full:
                profiler, self._profiler = self._profiler, None
                profiler.__exit__(None, None, None)
                self.events = profiler.key_averages(group_by_input_shape=True)
        elif full and self._wanted > 0:
            self._left, self._wanted = self._wanted, 0
            self._profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
            )
            self._profiler.__enter__()


async def profile_steps(
    workload: Workload, adapters: Sequence[Path], options: Mapping[str, str], scratch: Path, vocabulary: int
) -> StepProfile:
    """Run every scenario once for the parts, then the widest under the profiler."""
    recorder = StepRecorder(workload.most_at_once)
    driver = EngineDriver(adapters, options=options, scratch=scratch, metrics=recorder)
    parts: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    number = 1000  # prompts of no measured round
    try:
        await driver.start()
        for scenario in workload.scenarios:  # adapters are loaded by the first request: requests would not run together
            await _burst(workload, driver, scenario, number, vocabulary)
            number += 1
        for scenario in workload.scenarios:
            number += 1
            recorder.steps.clear()
            await _burst(workload, driver, scenario, number, vocabulary)
            counts[scenario.name] = len(recorder.steps)
            parts[scenario.name] = median_parts(recorder.steps)
        widest = max(workload.scenarios, key=lambda scenario: scenario.distinct)
        recorder.steps.clear()
        recorder.profile_next(max(1, min(MOST_PROFILED_STEPS, workload.output_tokens // 2)))
        with marked_kernels():
            await _burst(workload, driver, widest, number + 1, vocabulary)
    finally:
        await driver.close()
    groups, operations = group_operations(recorder.events or (), max(1, recorder.profiled))
    profiled = median_parts(recorder.steps[1 : recorder.profiled + 1])
    groups = with_unseen(groups, sum(profiled.values()))
    return StepProfile(workload.most_at_once, widest.name, parts, counts, groups, operations, profiled)


def median_parts(steps: Sequence[StepStats]) -> dict[str, float]:
    """Median milliseconds of each part; zeros without steps."""
    if not steps:
        return dict.fromkeys(PARTS, 0.0)
    return {part: statistics.median(getattr(step.times, part) for step in steps) * 1e3 for part in PARTS}


def group_operations(events: Any, steps: int, top: int = 15) -> tuple[dict[str, float], list[OperationShare]]:
    """Self milliseconds per step by group, largest first, and the `top` single operations."""
    groups: dict[str, float] = {}
    operations = []
    for event in events:
        milliseconds = event.self_cpu_time_total / 1e3 / steps
        if milliseconds <= 0:
            continue
        operation, marked = split_mark(event.key)
        group = find_group(operation)
        groups[group] = groups.get(group, 0.0) + milliseconds
        shapes = marked or " ".join(str(shape) for shape in event.input_shapes if shape)
        operations.append(OperationShare(operation, shapes, event.count / steps, milliseconds))
    operations.sort(key=lambda entry: -entry.milliseconds)
    return dict(sorted(groups.items(), key=lambda item: -item[1])), operations[:top]


def with_unseen(groups: Mapping[str, float], step: float) -> dict[str, float]:
    """The groups and what they leave of a step of `step` milliseconds: only torch's own operations are recorded."""
    return {**groups, UNSEEN: max(0.0, step - sum(groups.values()))}


def find_group(operation: str) -> str:
    """The group of an operation; prefixes count up to a whole word or an underscore."""
    for group, prefixes in GROUPS:
        for prefix in prefixes:
            rest = operation.removeprefix(prefix)
            if operation.startswith(prefix) and (prefix.endswith("::") or not rest or rest[0] in "_."):
                return group
    return "other"


async def _burst(workload: Workload, driver: EngineDriver, scenario: Scenario, number: int, vocabulary: int) -> None:
    calls = workload.calls(scenario, number, vocabulary)
    await send(driver, calls, workload.output_tokens, f"profile/{number}", workload.most_at_once)
