"""What training asks of a loss: a pure function of the log-probabilities of tokens. Knows no model and no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from loramux_trainer.data.examples import Example, Unit


@dataclass(frozen=True)
class Totals:
    """What the parts of one optimizer step are divided by; those of several chunks are added."""

    units: int = 0
    tokens: int = 0  # that the loss takes a mean over; 0 for a loss that takes none
    desirable: int = 0  # units with the label true

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.units + other.units, self.tokens + other.tokens, self.desirable + other.desirable)


class Loss(Protocol):
    """A step's units are computed in chunks: for each one `rows`, their log-probabilities, then `value`."""

    @property
    def name(self) -> str:
        """As the job calls it."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether `value` takes the log-probabilities of the frozen base too."""
        ...

    @property
    def least_units(self) -> int:
        """Units that a chunk must have for the value to be what it is meant to be; a rest of a step may have fewer."""
        ...

    def rows(self, units: Sequence[Unit]) -> tuple[Example, ...]:
        """The rows whose log-probabilities `value` wants for a chunk, in its order."""
        ...

    def totals(self, units: Sequence[Unit]) -> Totals:
        """The denominators of these units; those of a step are the sum over its chunks."""
        ...

    def value(
        self, policy: Sequence[Tensor], reference: Sequence[Tensor] | None, units: Sequence[Unit], totals: Totals
    ) -> tuple[Tensor, Mapping[str, float]]:
        """The chunk's share of the step's loss, a scalar with gradient, and its shares of the metrics that trl names.

        `policy[i]`: log-probabilities [n_i] of the supervised tokens of row i, with gradient. `reference[i]`: the
        frozen base's, without; their sum [1] will do, as every loss with a reference is one of whole answers.
        Shares of all chunks add up to the step's mean, those of metrics too. Raises ValueError for another number of
        rows.
        """
        ...
