"""Every method and initialization, trained in one fleet on one base, and what three ways of computing say of each."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from loramux_adapters.base.load import LoadedBase, load_base
from loramux_adapters.guard.examine import examine
from loramux_adapters.spec import BaseModelSpec
from loramux_trainer import fleet_run, member_run
from loramux_trainer.data.examples import IGNORE, Example
from loramux_trainer.fleet.model import FleetModel, MemberRows
from loramux_trainer.job import TrainConfig, parse_job
from loramux_trainer.methods.trained import TrainedAdapter
from support.against_peft import Truth
from support.checkpoints import float_base, save_checkpoint, wide_model
from support.kinds import KindOracle, pristine_model
from support.method_rows import Job, jobs_of
from support.model_engine import ModelEngine
from support.tiny import conversation, tiny_tokenizer, write_jsonl
from support.training import train_together

STEPS = 4
COUNT = 3
"""Tokens that each adapter generates."""
PROMPT = [5, 60, 7, 101, 111, 114, 33, 90, 200, 17, 65, 99, 115, 40]


def save_base(architecture: str, root: Path) -> Path:
    """A checkpoint of it with a tokenizer, and the training data beside it."""
    tokenizer = tiny_tokenizer()
    root.mkdir(parents=True, exist_ok=True)
    model = wide_model(architecture, eos_token_id=tokenizer.eos_token_id)
    base = save_checkpoint(model, root / architecture)
    tokenizer.save_pretrained(base)
    records = [{"messages": conversation(f"word{i * 7 % 40}", f"drow{i}{'!' * (i % 5)}")} for i in range(24)]
    write_jsonl(root / "train.jsonl", records)
    return base


def job_of(base: Path, name: str, row: Job, root: Path) -> TrainConfig:
    """A row's job: a few large steps."""
    common: dict[str, Any] = {
        "model": str(base),
        "name": hashlib.sha256(name.encode()).hexdigest()[:12],
        "output": name,
        "data": {"train": str(base.parent / "train.jsonl")},
        "training": {"learning_rate": 0.02, "max_steps": STEPS, "batch_size": 2, "warmup_steps": 0},
    }
    method = row.get("method", "lora")
    ranked = {"rank": 4, "alpha": 8} if method in ("lora", "rslora", "dora", "adalora", "loha", "lokr") else {}
    merged = common | dict(row) | ({"lora": ranked | dict(row.get("lora", {}))} if ranked or "lora" in row else {})
    merged["training"] = common["training"] | dict(row.get("training", {}))
    return parse_job(merged, root=root)


@dataclass(frozen=True, eq=False)
class Trained:
    """What came of one fleet: the members' own tensors beside the directories that were exported."""

    base: Path
    rows: dict[str, Path]
    adapters: dict[str, TrainedAdapter]
    fingerprints: dict[str, set[str]] = field(default_factory=dict)
    """Of the base: before, after (from the NF4 bytes at each export), and as results have it."""


def train_rows(architecture: str, root: Path, rows: Mapping[str, Job] | None = None) -> Trained:
    """All rows of an architecture, or some of one's own, in one fleet."""
    base = save_base(architecture, root)
    before = float_base(base).spec.fingerprint
    jobs = {name: job_of(base, name, row, root) for name, row in (rows or jobs_of(architecture)).items()}
    adapters: dict[Path, TrainedAdapter] = {}
    after: set[str] = set()

    def keep(output: Path, adapter: TrainedAdapter, spec: BaseModelSpec, *more: Any) -> None:
        adapters[output] = adapter
        export(output, adapter, spec, *more)

    def remember(loaded: LoadedBase) -> str:
        found = refingerprint(loaded)
        after.add(found)
        return found

    export, refingerprint = member_run.export, fleet_run.refingerprint
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(member_run, "export", keep))
        patches.enter_context(mock.patch.object(fleet_run, "refingerprint", remember))
        outcome = train_together(list(jobs.values()))
    assert not outcome.failures
    outputs = {name: job.output for name, job in jobs.items()}
    said = {result.base_fingerprint for result in outcome.results.values()}
    prints = {"before": {before}, "after": after, "results": said, "files": {float_base(base).spec.fingerprint}}
    return Trained(base, outputs, {name: adapters[path] for name, path in outputs.items()}, prints)


@dataclass(frozen=True, eq=False)
class Row:
    """Largest differences of a row's logits to PEFT's (for bottlenecks: to the reference of AdapterHub's), over the
    standard deviation of these.
    """

    training: float
    alone: float
    mixed: float
    same_tokens: bool
    moved: float  # of the base's own to PEFT's: what training changed
    first: torch.Tensor  # [vocabulary] of the first token, as PEFT has them


def measure(trained: Trained) -> dict[str, Row]:
    """Each row by the training graph, by PEFT, and served alone and in one batch of all rows and the base's own."""
    truths: dict[str, Truth] = {}
    for name, path in trained.rows.items():
        oracle = KindOracle(trained.base, path, model=copy.deepcopy(pristine_model(trained.base)))
        truths[name] = oracle.truth(name, PROMPT, COUNT)
    bare = KindOracle(trained.base, None, model=copy.deepcopy(pristine_model(trained.base)))
    training = training_logits(trained, {name: PROMPT + truth.tokens for name, truth in truths.items()})
    engine = ModelEngine(float_base(trained.base), trained.rows, capacity=2048, kv_blocks=512)
    tickets = {name: engine.submit(name, PROMPT, COUNT) for name in (*truths, None)}
    engine.run()
    rows = {}
    for name, truth in truths.items():
        alone = engine.submit(name, PROMPT, COUNT)
        engine.run()
        own = bare.logits(PROMPT + truth.tokens)[len(PROMPT) - 1 : -1]
        rows[name] = Row(
            difference(training[name], truth),
            difference(engine.logits(alone), truth),
            difference(engine.logits(tickets[name]), truth),
            engine.tokens(alone) == engine.tokens(tickets[name]) == truth.tokens,
            difference(own, truth),
            truth.logits[0],
        )
    return rows


def difference(logits: torch.Tensor, truth: Truth) -> float:
    """The largest, over the standard deviation."""
    return float((logits - truth.logits).abs().max() / truth.logits.std())


@torch.no_grad()
def training_logits(trained: Trained, tokens: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """[COUNT, vocabulary] of each row, by the graph that trained it: all members in one micro-batch."""
    base = load_base(trained.base, compute_dtype=torch.float32)
    members = []
    for slot, (name, ids) in enumerate(tokens.items()):
        adapter = trained.adapters[name]
        labels = (*[IGNORE] * len(PROMPT), *ids[len(PROMPT) :])
        parts = adapter.parts(with_gradients=False)
        members.append(MemberRows(parts, (Example(tuple(ids), labels),), slot, adapter.virtual_tokens))
    with FleetModel(base, examine(base, 128)) as model, model.running(members) as hidden:
        logits = model._logits(hidden.states, hidden.rows)
    return dict(zip(tokens, torch.split(logits, list(hidden.counts)), strict=True))
