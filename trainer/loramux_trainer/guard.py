"""What the eval losses of a job say: which evaluation is the best, whether to stop, which epochs are worse.

Pure functions of the evaluations so far, so that a resumed run decides as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from loramux_trainer.progress import EvalReport


def best_of_evals(evals: Sequence[EvalReport]) -> EvalReport | None:
    """The lowest loss, the first of equal ones."""
    return min(evals, key=lambda report: report.loss, default=None)


def is_patience_over(evals: Sequence[EvalReport], patience: int, threshold: float) -> bool:
    """Whether `patience` evaluations one after the other were not below the best before them by more than
    `threshold`: the rule of transformers' EarlyStoppingCallback.
    """
    best, waited = float("inf"), 0
    for report in evals:
        waited = 0 if best - report.loss > threshold else waited + 1
        if waited >= patience:
            return True
        best = min(best, report.loss)
    return False


def worse_epochs(evals: Sequence[EvalReport], steps_per_epoch: int) -> list[str]:
    """A sentence for each epoch that ended with a higher eval loss than the one evaluated before it."""
    ends = [report for report in evals if report.step % steps_per_epoch == 0]
    return [
        f"epoch {after.step // steps_per_epoch} is worse than epoch {before.step // steps_per_epoch}: eval loss "
        f"{after.loss:.4f}, it was {before.loss:.4f}; train fewer epochs, or export the best by "
        "training.load_best_model_at_end"
        for before, after in pairwise(ends)
        if after.loss > before.loss
    ]
