"""A job looked at as the run would, as far as one can without the weights: `loramux train --check`.

Everything found is reported together. The base's files and tokenizer are read where they are on this machine.
"""

from __future__ import annotations

from pathlib import Path

from loramux_trainer.errors import ModelInvalid, Problems
from loramux_trainer.job import TrainConfig
from loramux_trainer.preflight import (
    check_engine,
    check_given_device,
    check_paths,
    check_records,
    check_trackers,
    find_model,
    is_readable,
)
from loramux_trainer.schedule import warmup_length


def check_whole_job(job: TrainConfig, *, resume: bool) -> tuple[str, ...] | None:
    """What the run would warn of before its first step; None where the base is not on this machine, so that targets and
    tokens were not looked at. Raises what a run would.
    """
    problems = Problems()
    files: Path | None = None
    with problems.collecting():
        check_given_device(job)
    with problems.collecting():
        files = find_model(job)
    check_engine(job, problems)
    check_trackers(job, problems)
    check_paths(job, problems, resume=resume)
    if files is None:
        check_records(job, problems)
        problems.raise_any()
        return None
    warnings = _check_against_base(job, files, problems)
    problems.raise_any()
    return tuple(warnings)


def _check_against_base(job: TrainConfig, files: Path, problems: Problems) -> list[str]:
    """The run's warnings."""
    # Seconds of imports, which a job with a broken base need not wait for.
    import torch

    from loramux_adapters.base.unloaded import read_unloaded
    from loramux_trainer.advice import warnings_before
    from loramux_trainer.base_reading import read_base
    from loramux_trainer.batches import StepOrder
    from loramux_trainer.data.check import check_data
    from loramux_trainer.data.dataset import check_context
    from loramux_trainer.data.prompts import encode_prompts
    from loramux_trainer.parameter_count import count_parameters
    from loramux_trainer.targets import modules_of

    try:
        base = read_base(job, str(files))
    except ModelInvalid as problem:
        problems.add(problem)
        check_records(job, problems)
        return []
    with problems.collecting():
        modules_of(job, base.outline)
    if not all(is_readable(path) for path in (job.data.train, job.data.eval) if path is not None):
        check_records(job, problems)
        return []
    if job.loss.name == "grpo":
        with problems.collecting():
            encode_prompts(job.data, base.encoder, base.outline.context_length, job.loss.longest_completion)
        return []
    with problems.collecting():
        lengths = check_data(job.data, base.encoder, seed=job.training.seed, loss=job.loss)
        check_context(lengths.longest + job.virtual_tokens, base.outline.context_length)
        order = StepOrder.of(job.training, lengths.train)
        steps = job.training.max_steps
        if steps is None:
            steps = job.training.num_train_epochs * order.steps_per_epoch
            warmup_length(job.training.warmup_steps, steps)
        if not problems and job.engine == "fleet":
            unloaded = read_unloaded(files, compute_dtype=torch.float32, device=torch.device("cpu"))
            parameters = count_parameters(job, unloaded, steps)
            return list(warnings_before(job, lengths.report, steps / order.steps_per_epoch, parameters))
    return []
