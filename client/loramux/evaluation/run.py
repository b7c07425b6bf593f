"""The evaluation: every record at the base and at each adapter, several at once, each adapter by one version."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from loramux.client import Client
from loramux.errors import LoramuxError
from loramux.evaluation.scoring import EvaluationInvalid, Judge, Scorer
from loramux.evaluation.values import BASE, METRICS, EvalRecord, Evaluation, Metric, Outcome, Row


def evaluate(
    client: Client,
    records: Sequence[EvalRecord],
    adapters: Sequence[str],
    metrics: Sequence[Metric] = ("exact",),
    *,
    pattern: str | None = None,
    judge: Judge | None = None,
    max_tokens: int = 256,
    concurrency: int = 16,
    on_scored: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score `records` at the base and at `adapters` (name, alias or name@digest) on the client's server.

    At most `concurrency` requests are under way; `judge` is called by as many threads. A name is resolved once: one
    that is moved meanwhile does not mix two versions. `on_scored` is called for each record of each row, from the
    calling thread or another. Raises EvaluationInvalid, and LoramuxError of the server, with file and line.
    """
    scorer = Scorer(client, tuple(dict.fromkeys(metrics)), max_tokens, pattern, judge)
    _check(scorer, records, concurrency)
    versions = {BASE: None, **{name: _resolve(client, name, scorer.metrics) for name in adapters}}
    outcomes: dict[str, list[Future[Outcome]]] = {name: [] for name in versions}
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="evaluate")
    try:
        for record in records:
            for name, version in versions.items():
                reference = BASE if version is None else f"{version[0]}@{version[1]}"
                future = pool.submit(_score, scorer, record, reference)
                future.add_done_callback(lambda ended: None if ended.cancelled() else on_scored())
                outcomes[name].append(future)
        wait([future for each in outcomes.values() for future in each], return_when=FIRST_EXCEPTION)
    finally:
        pool.shutdown(cancel_futures=True)  # waits for what has begun: the earliest failure among it is raised
    _raise_first(outcomes)
    rows = {
        name: Row(name, None if version is None else version[1], tuple(each.result() for each in outcomes[name]))
        for name, version in versions.items()
    }
    return Evaluation(scorer.metrics, rows)


def _check(scorer: Scorer, records: Sequence[EvalRecord], concurrency: int) -> None:
    unknown = [metric for metric in scorer.metrics if metric not in METRICS]
    if unknown or not scorer.metrics:
        said = f"there is no metric {unknown[0]!r}" if unknown else "there is no metric to compute"
        raise EvaluationInvalid(said, remedy=f"known: {', '.join(METRICS)}")
    if "judge" in scorer.metrics and scorer.judge is None:
        raise EvaluationInvalid("metric judge needs a judge", remedy="give --judge MODULE:FUNCTION")
    if not records:
        raise EvaluationInvalid("there is no record to evaluate")
    if concurrency < 1 or scorer.max_tokens < 1:
        raise EvaluationInvalid("concurrency and max_tokens must be at least 1")
    for record in records:
        scorer.check(record)


def _resolve(client: Client, name: str, metrics: Sequence[Metric]) -> tuple[str, str]:
    """(name, digest) of the version that the reference means now."""
    if not name:
        raise EvaluationInvalid("an adapter's name is empty", remedy="leave it out: the base is always a row")
    adapter = client.adapter(name)
    if "loss" in metrics and adapter.text_files:
        raise EvaluationInvalid(
            f"{name} has a tokenizer or chat template of its own, so that its loss on the base's tokens means nothing",
            remedy="push it with --no-tokenizer, or leave out metric loss",
        )
    return adapter.name, adapter.digest


def _score(scorer: Scorer, record: EvalRecord, reference: str) -> Outcome:
    try:
        return scorer.score(record, reference)
    except LoramuxError as error:
        error.message = f"{record.where}: {error.message}"  # the kind decides how the caller goes on: it stays
        raise


def _raise_first(outcomes: dict[str, list[Future[Outcome]]]) -> None:
    """The failure of the earliest record, whichever thread met one first."""
    for at_record in zip(*outcomes.values(), strict=True):
        for future in at_record:
            if not future.cancelled() and (error := future.exception()) is not None:
                raise error
