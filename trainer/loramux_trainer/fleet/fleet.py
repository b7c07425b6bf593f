"""Many members on one frozen base: a step of the fleet is one optimizer step of every member that runs.

Members come and go between steps. Their gradients are those of a run alone; in deterministic mode to the bit. Knows no
file and no job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from loramux_adapters.errors import AdapterError
from loramux_trainer.errors import DeviceFull
from loramux_trainer.fleet.member import Member, UnitChunk
from loramux_trainer.fleet.micro_batch import Chunk, pack
from loramux_trainer.fleet.model import FleetModel, Hidden, MemberRows
from loramux_trainer.fleet.parts import StepParts
from loramux_trainer.fleet.random import generator
from loramux_trainer.fleet.rows import Dropout
from loramux_trainer.fleet.statistics import weight_gradients
from loramux_trainer.fleet.torch_errors import NoDecomposition, is_out_of_memory
from loramux_trainer.losses.protocol import Totals
from loramux_trainer.losses.reference import PrecomputedReference
from loramux_trainer.losses.sft import SftLoss
from loramux_trainer.optimizers.hessian import gauss_newton_bartlett_estimate
from loramux_trainer.progress import EvalReport, StepReport

_LEAST_TOKENS = 64
"""A token budget is not halved below it."""


class _NotFinite(Exception):
    """A member has nothing to draw labels from."""


@dataclass(eq=False)
class _Turn:
    """One member in one step, or in one evaluation."""

    member: Member
    slot: int
    parts: StepParts
    totals: Totals
    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def add(self, loss: float, metrics: Mapping[str, float]) -> None:
        """A chunk's share."""
        self.loss += loss
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value


class Fleet:
    """`warn` is told what a user should know of: a budget that was halved for want of memory."""

    def __init__(self, model: FleetModel, *, token_budget: int, warn: Callable[[str], None] = lambda _: None) -> None:
        self._model, self._warn = model, warn
        self.token_budget = token_budget
        self.members: list[Member] = []

    @property
    def running(self) -> list[Member]:
        """Those that take part in the next step."""
        return [member for member in self.members if member.state == "running"]

    def admit(self, member: Member) -> None:
        """It takes part from the next step on. Raises ValueError for a name that is there."""
        if any(member.name == other.name for other in self.members):
            raise ValueError(f"the fleet has a member {member.name}")
        self.members.append(member)

    def release(self, member: Member) -> None:
        """It takes no further part; its tensors are its own."""
        self.members.remove(member)

    def step(self) -> dict[str, StepReport]:
        """One optimizer step of every running member: name -> report. Those that diverge have none, and say so.

        Raises DeviceFull where there is no memory for the smallest micro-batch.
        """
        reports: dict[str, StepReport] = {}
        while True:
            try:
                self._step(reports)
                return reports
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                for member in self.running:
                    member.adapter.parameters.clear()
                self._shrink(error)

    @torch.no_grad()
    def evaluate(self, members: Sequence[Member]) -> dict[str, EvalReport]:
        """Mean loss over each one's evaluation set, without dropout; changes nothing. Those without a set are left, and
        those whose tensors come to numbers that are not finite: they have diverged.
        """
        turns = []
        for slot, member in enumerate(members):
            if member.held_out:
                totals = member.loss.totals(member.held_out)
                try:
                    parts = member.adapter.parts(with_gradients=False)
                except AdapterError as error:
                    member.diverge(f"step {member.step}: {error}")
                    continue
                turns.append(_Turn(member, slot, parts, totals))
        while True:
            try:
                for turn in turns:
                    turn.loss = 0.0
                chunks = [self._chunk(turn, c, is_training=False) for turn in turns for c in turn.member.eval_chunks()]
                for batch in pack(chunks, self.token_budget):
                    self._compute(batch)
                return {turn.member.name: EvalReport(turn.member.step, turn.loss) for turn in turns}
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(error)

    def _step(self, reports: dict[str, StepReport]) -> None:
        """Of those that are not in `reports` yet; adds theirs. None is taken twice."""
        turns, chunks = [], []
        for slot, member in enumerate(self.running):
            if member.name in reports:
                continue
            try:
                self._give_gradients(member)
                self._give_hessian(member)
                parts = member.adapter.parts(with_gradients=True)
            except (AdapterError, _NotFinite, NoDecomposition) as error:
                member.diverge(f"step {member.step + 1}: {error}")
                continue
            own = member.chunks()
            turns.append(_Turn(member, slot, parts, _totals(member, own)))
            drops = member.options.dropout > 0
            chunks += [self._chunk(turns[-1], chunk, is_training=True, with_dropout=drops) for chunk in own]
        for batch in pack(chunks, self.token_budget):
            self._compute(batch)
        for turn in turns:
            turn.loss += turn.parts.backward()
        for turn in turns:
            report = turn.member.finish_step(turn.loss, turn.totals, turn.metrics)
            if report is not None:
                reports[turn.member.name] = report

    def _give_gradients(self, member: Member) -> None:
        """Those of the frozen weights at this step, alone, where its method asks for them."""
        modules = member.adapter.wants_gradients(member.step)
        if not modules:
            return

        def run(chunk: Chunk[_Turn]) -> None:
            self._compute([chunk])

        member.adapter.take_gradients(weight_gradients(self._model, modules, lambda: self._alone(member), run))
        member.adapter.parameters.clear()

    def _give_hessian(self, member: Member) -> None:
        """An estimate of the Hessian's diagonal where the optimizer asks for one: the Gauss-Newton-Bartlett estimator,
        an ordinary backward pass with labels drawn from the member's own predictions (Liu et al., 2023).
        """
        if not member.optimizer.needs_hessian:
            return
        own = member.chunks()
        sequences = [member.loss.rows(chunk.units) for chunk in own]
        tokens = sum(each.supervised for chunk in sequences for each in chunk)
        parts = member.adapter.parts(with_gradients=True)
        source = generator(member.options.seed, f"hessian/{member.step}")
        for chunk in sequences:
            with self._model.running([MemberRows(parts, chunk, 0, member.adapter.virtual_tokens)]) as hidden:
                drawn = self._drawn(hidden, source)
                weights = torch.full((len(drawn.targets),), 1.0 / tokens, device=drawn.states.device)
                loss, _ = self._model.token_loss(drawn, weights)
                loss.backward()  # type: ignore[no-untyped-call]
        parts.backward()
        gradients = [group.flat.grad for group in member.adapter.parameters.groups]
        member.optimizer.give_hessian(
            [gauss_newton_bartlett_estimate(each, tokens) for each in gradients if each is not None]
        )
        member.adapter.parameters.clear()

    def _drawn(self, hidden: Hidden, source: torch.Generator) -> Hidden:
        """See FleetModel.sample. Raises _NotFinite."""
        try:
            return self._model.sample(hidden, source)
        except RuntimeError as error:
            if "probability tensor" in str(error):  # torch has no error of its own for it
                raise _NotFinite("the predictions are not finite") from error
            raise

    @torch.no_grad()
    def precompute_reference(self, member: Member) -> None:
        """The base's log-probabilities of the training data, once: cheaper from the second epoch on."""
        rows = [member.loss.rows((unit,)) for unit in member.train]
        reference = PrecomputedReference([len(each) for each in rows])
        chunks = [Chunk(index, 0, sequences) for index, sequences in enumerate(rows)]
        while True:
            try:
                for batch in pack(chunks, self.token_budget):
                    self._put_reference(reference, batch)
                member.reference = reference
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(error)

    def _put_reference(self, reference: PrecomputedReference, batch: Sequence[Chunk[int]]) -> None:
        with self._model.running([MemberRows(None, chunk.sequences, -1) for chunk in batch]) as hidden:
            at = 0
            for chunk in batch:
                part = hidden.part(at, at + len(chunk.sequences))
                reference.put(chunk.owner, self._reference(part))
                at += len(chunk.sequences)

    def _alone(self, member: Member) -> list[Chunk[_Turn]]:
        own = member.chunks()
        turn = _Turn(member, 0, member.adapter.parts(with_gradients=True), _totals(member, own))
        return [self._chunk(turn, chunk, is_training=True) for chunk in own]

    def _chunk(self, turn: _Turn, chunk: UnitChunk, *, is_training: bool, with_dropout: bool = False) -> Chunk[_Turn]:
        member = turn.member
        return Chunk(
            owner=turn,
            number=chunk.number,
            sequences=member.loss.rows(chunk.units),
            units=chunk.units,
            indices=chunk.indices if is_training else None,
            reference=member.loss.needs_reference and not (is_training and member.reference is not None),
            virtual_tokens=member.adapter.virtual_tokens,
            dropout=Dropout(member.options.dropout, member.dropout_key(chunk.number)) if with_dropout else None,
        )

    def _compute(self, chunks: Sequence[Chunk[_Turn]]) -> None:
        """One forward, and one backward where gradients are wanted."""
        references = [chunk for chunk in chunks if chunk.reference]
        chunks = sorted(chunks, key=lambda chunk: not _is_token_mean(chunk.owner))  # stable: their order stays
        rows = [MemberRows(None, chunk.sequences, -1) for chunk in references]
        rows += [_rows(chunk) for chunk in chunks]
        with self._model.running(rows) as hidden:
            at = 0
            of_base: dict[int, list[torch.Tensor]] = {}
            for chunk in references:
                of_base[id(chunk)] = self._reference(hidden.part(at, at + len(chunk.sequences)))
                at += len(chunk.sequences)
            losses = []
            token_means = [chunk for chunk in chunks if _is_token_mean(chunk.owner)]
            if token_means:
                stop = at + sum(len(chunk.sequences) for chunk in token_means)
                losses.append(self._token_means(hidden.part(at, stop), token_means))
                at = stop
            for chunk in chunks[len(token_means) :]:
                stop = at + len(chunk.sequences)
                losses.append(self._value(hidden.part(at, stop), chunk, of_base.get(id(chunk))))
                at = stop
            total = torch.stack(losses).sum()
            if total.requires_grad:
                total.backward()  # type: ignore[no-untyped-call]

    def _token_means(self, hidden: Hidden, chunks: Sequence[Chunk[_Turn]]) -> torch.Tensor:
        counts = [sum(each.supervised for each in chunk.sequences) for chunk in chunks]
        shares = [1.0 / chunk.owner.totals.tokens for chunk in chunks]
        repeats = torch.tensor(counts, device=hidden.states.device)
        weights = torch.tensor(shares, device=hidden.states.device).repeat_interleave(repeats)
        loss, each = self._model.token_loss(hidden, weights)
        for chunk, own in zip(chunks, torch.split(each * weights, counts), strict=True):
            chunk.owner.add(float(own.sum()), {})
        return loss

    def _value(self, hidden: Hidden, chunk: Chunk[_Turn], reference: list[torch.Tensor] | None) -> torch.Tensor:
        policy = torch.split(self._model.log_probs(hidden), list(hidden.counts))
        turn = chunk.owner
        kept = turn.member.reference
        if reference is None and kept is not None and chunk.indices is not None:
            reference = kept.of(chunk.indices, hidden.states.device)
        loss, metrics = turn.member.loss.value(policy, reference, chunk.units, turn.totals)
        turn.add(float(loss.detach()), metrics)
        return loss

    @torch.no_grad()
    def _reference(self, hidden: Hidden) -> list[torch.Tensor]:
        return list(torch.split(self._model.log_probs(hidden), list(hidden.counts)))

    def _shrink(self, error: Exception) -> None:
        """Half the budget for all, and for each member's own chunks where they are as large."""
        if self.token_budget <= _LEAST_TOKENS:
            raise DeviceFull from error
        self.token_budget //= 2
        for member in self.members:
            member.chunk_tokens = min(member.chunk_tokens, self.token_budget)
        self._warn(f"out of memory: micro-batches have {self.token_budget} tokens from now on")


def _totals(member: Member, chunks: Sequence[UnitChunk]) -> Totals:
    return sum((member.loss.totals(chunk.units) for chunk in chunks), Totals())


def _is_token_mean(turn: _Turn) -> bool:
    """Whether each token's weight is known before its log-probability: the head is then computed twice, not thrice."""
    loss = turn.member.loss
    return isinstance(loss, SftLoss) and loss.kind == "nll"


def _rows(chunk: Chunk[_Turn]) -> MemberRows:
    turn = chunk.owner
    return MemberRows(turn.parts, chunk.sequences, turn.slot, chunk.virtual_tokens, chunk.dropout)
