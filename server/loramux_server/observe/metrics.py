"""Every Prometheus name of the server, and the one object that counts.

Implements the engine's Observer (called on the engine thread) and the API's hooks. What is a state, not an event, is
read when it is scraped. Names are vLLM's where it has them, without colons: OpenMetrics renames those. What the engine
runs is counted as it runs it: a request with n choices is n sequences.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from loramux_adapters.store.records import AdapterNames
from loramux_server.engine.stats import WAIT_REASONS, Load, StepStats
from loramux_server.observe.logs import DIGITS
from loramux_server.observe.top_series import OTHER, TopSeries

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_COUNTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_STEP_PARTS = ("plan", "run", "prepare", "forward", "sample", "commit", "publish")
_MAX_NAMES = 4096
_MAX_LISTED = 256
BASE = "base"

Names = Callable[[Collection[str]], Mapping[str, AdapterNames]]
"""What points at digests now; asked on a scrape's thread."""

Existing = Callable[[Collection[str]], Collection[str]]
"""Those of some digests of which there is a version; asked on a scrape's thread."""


@dataclass(frozen=True)
class AdapterReading:
    """The adapter side at the moment of a scrape. Counts since start where the name says total."""

    tiers: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # tier -> adapters, bytes
    leases: int = 0
    pinned: int = 0  # versions to be kept on the device, whether they are there or not
    loads_total: Mapping[str, int] = field(default_factory=dict)  # outcome -> loads
    load_seconds_total: float = 0.0
    evictions_total: Mapping[str, int] = field(default_factory=dict)  # tier -> evictions
    hits_total: int = 0  # acquisitions that found the adapter resident
    lease_waits_total: int = 0  # acquisitions that had to wait
    merged_adapters: int = 0
    merged_bytes: int = 0
    merges_total: Mapping[str, int] = field(default_factory=dict)  # outcome -> builds
    slots: int = 0


class Metrics:
    """Counts into its own registry; hand that to an exporter."""

    def __init__(
        self,
        adapters: Callable[[], AdapterReading] = AdapterReading,
        top_adapters: int = 50,
        names: Names = lambda digests: {},
        existing: Existing = lambda digests: digests,
    ) -> None:
        registry = self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._load: Load | None = None
        self._names: OrderedDict[str, str] = OrderedDict()
        self._existing = existing
        self._per_adapter_sequences = TopSeries(top_adapters)
        self._per_adapter_tokens = TopSeries(top_adapters)
        self._calls = Counter("loramux_calls", "Finished calls.", ["method", "code"], registry=registry)
        self._call_seconds = Histogram(
            "loramux_call_seconds", "Duration of calls.", ["method"], buckets=_LONG, registry=registry
        )
        self._sequences = Counter("loramux_sequences", "Sequences that ended.", ["outcome"], registry=registry)
        self._rejections = Counter("loramux_rejections", "Requests refused.", ["reason"], registry=registry)
        self._prompt_tokens = Counter("loramux_prompt_tokens", "Prompt tokens of ended sequences.", registry=registry)
        self._generation_tokens = Counter(
            "loramux_generation_tokens", "Output tokens of ended sequences.", registry=registry
        )
        self._step_tokens = Counter("loramux_step_tokens", "Tokens computed in steps.", registry=registry)
        self._queue = _histogram(
            registry, "loramux_request_queue_time_seconds", "From acceptance to the first step.", _LONG
        )
        self._first = _histogram(registry, "loramux_time_to_first_token_seconds", "From acceptance to a token.", _LONG)
        self._inter = _histogram(
            registry, "loramux_inter_token_latency_seconds", "Between two tokens of a sequence.", _SHORT
        )
        self._whole = _histogram(
            registry, "loramux_e2e_request_latency_seconds", "From acceptance to the end of a sequence.", _LONG
        )
        self._step = _histogram(registry, "loramux_step_seconds", "One turn of the engine's loop.", _SHORT)
        self._parts = Counter("loramux_step_part_seconds", "Time in the parts of steps.", ["part"], registry=registry)
        self._parts_by_name = {part: self._parts.labels(part) for part in _STEP_PARTS}
        self._steps = Counter("loramux_steps", "Steps by the weights they ran on.", ["weights"], registry=registry)
        self._distinct = _histogram(registry, "loramux_step_distinct_adapters", "Adapters in one step.", _COUNTS)
        self._preemptions = Counter("loramux_num_preemptions", "Sequences put back to make room.", registry=registry)
        self._queried = Counter(
            "loramux_prefix_cache_queries", "Tokens looked up in the prefix cache.", registry=registry
        )
        self._hit = Counter("loramux_prefix_cache_hits", "Tokens found in the prefix cache.", registry=registry)
        self._uploads = Counter("loramux_uploads", "Ended adapter uploads.", ["outcome"], registry=registry)
        self._upload_bytes = Counter("loramux_upload_bytes", "Bytes of adapters received.", registry=registry)
        self._serving = Gauge("loramux_serving", "1 while the server accepts requests.", registry=registry)
        self._server = Info("loramux_server", "The base and how it is computed.", registry=registry)
        registry.register(_Scraped(self, adapters, names))
        ProcessCollector(registry=registry)

    def step(self, stats: StepStats) -> None:
        """A turn of the engine's loop (engine thread)."""
        counters, times = stats.counters, stats.times
        self._load = stats.load
        if stats.tokens:
            self._step_tokens.inc(stats.tokens)
            self._steps.labels(stats.weights).inc()
            self._distinct.observe(stats.distinct_adapters)
            self._step.observe(times.plan + times.run + times.commit + times.publish)
        for part, counter in self._parts_by_name.items():
            counter.inc(getattr(times, part))
        for histogram, values in (
            (self._queue, counters.queued),
            (self._first, counters.first_token),
            (self._inter, counters.inter_token),
        ):
            for value in values:
                histogram.observe(value)
        for ended in counters.ended:
            self._sequences.labels(ended.outcome).inc()
            self._whole.observe(ended.seconds)
            self._prompt_tokens.inc(ended.prompt)
            self._generation_tokens.inc(ended.completion)
            adapter = BASE if ended.digest is None else ended.digest
            self._per_adapter_sequences.add(adapter, 1)
            self._per_adapter_tokens.add(adapter, ended.completion)
        self._preemptions.inc(counters.preemptions)
        self._queried.inc(counters.prefix_queried)
        self._hit.inc(counters.prefix_hit)

    def rejected(self, reason: str) -> None:
        """A request refused at submission."""
        self._rejections.labels(reason).inc()

    def call(self, method: str, code: str, seconds: float) -> None:
        """A finished call; `method` is one the server has."""
        self._calls.labels(method, code).inc()
        self._call_seconds.labels(method).observe(seconds)

    def upload(self, outcome: str) -> None:
        """An upload ended: created, unchanged, cut or an error table's reason."""
        self._uploads.labels(outcome).inc()

    def received(self, count: int) -> None:
        """Bytes of an upload were written."""
        self._upload_bytes.inc(count)

    def serving(self, value: bool) -> None:
        """Whether the server takes requests."""
        self._serving.set(1 if value else 0)

    def describe(self, facts: Mapping[str, str]) -> None:
        """What this server is, once, at start."""
        self._server.info(dict(facts))

    def named(self, digest: str, name: str) -> None:
        """`name` was last used for `digest`: endpoint pickers route by name."""
        with self._lock:
            self._names[digest] = name
            self._names.move_to_end(digest)
            if len(self._names) > _MAX_NAMES:
                self._names.popitem(last=False)

    def names_of(self, digests: frozenset[str]) -> str:
        """Sorted names, comma between: what endpoint pickers read."""
        with self._lock:
            return ",".join(sorted(self._names.get(digest, digest[:DIGITS]) for digest in digests)[:_MAX_LISTED])

    def load(self) -> Load | None:
        """The engine's load after its last turn."""
        return self._load

    def per_adapter(self) -> tuple[dict[str, float], dict[str, float]]:
        """Ended sequences and output tokens by adapter: a digest, `base` or `other`.

        Those that are gone for good lose their series here and not when they go: their last request may end later.
        """
        counted = self._per_adapter_sequences.read().keys() | self._per_adapter_tokens.read().keys()
        gone = counted - {BASE, OTHER}
        gone -= set(self._existing(gone)) if gone else set()
        for series in (self._per_adapter_sequences, self._per_adapter_tokens):
            series.drop(gone)
        return self._per_adapter_sequences.read(), self._per_adapter_tokens.read()


class _Scraped:
    """States, read at the scrape: no child of a label outlives what it describes."""

    def __init__(self, metrics: Metrics, adapters: Callable[[], AdapterReading], names: Names) -> None:
        self._metrics = metrics
        self._adapters = adapters
        self._names = names

    def collect(self) -> Iterator[Metric]:
        reading = self._adapters()
        yield from self._engine(reading.slots)
        yield from _adapter_families(reading)
        sequences, tokens = self._metrics.per_adapter()
        yield _counters("loramux_adapter_sequences", "Ended sequences by adapter.", "adapter", _shortened(sequences))
        yield _counters("loramux_adapter_generation_tokens", "Output tokens by adapter.", "adapter", _shortened(tokens))
        yield self._adapter_info((sequences.keys() | tokens.keys()) - {BASE, OTHER})

    def _adapter_info(self, digests: Collection[str]) -> Metric:
        """What joins the label `adapter` of other series with the names that point at it now; one sample each."""
        info = GaugeMetricFamily(
            "loramux_adapter_info",
            "Names and aliases of adapters that have series of their own; several with a comma between.",
            labels=["adapter", "digest", "name", "aliases"],
        )
        for digest, found in sorted(self._names(digests).items()):
            names, aliases = (",".join(each)[:_MAX_LISTED] for each in (found.names, found.aliases))
            info.add_metric([digest[:DIGITS], digest, names, aliases], 1)
        return info

    def _engine(self, slots: int) -> Iterator[Metric]:
        load = self._metrics.load()
        running = 0 if load is None else load.running
        yield GaugeMetricFamily(
            "loramux_num_requests_running", "Requests in the batch; one with n choices counts n times.", value=running
        )
        waiting: dict[str, float] = {reason: load.waiting.get(reason, 0) if load else 0 for reason in WAIT_REASONS}
        yield _gauges(
            "loramux_num_requests_waiting",
            "Waiting requests, by what they wait for; one with n choices counts n times.",
            "reason",
            waiting,
        )
        used = load.kv_blocks_held / load.kv_blocks if load and load.kv_blocks else 0.0
        yield GaugeMetricFamily("loramux_kv_cache_usage_ratio", "Share of KV blocks held by requests.", value=used)
        info = GaugeMetricFamily(
            "loramux_lora_requests_info",
            "Adapters in use, for endpoint pickers.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        names = self._metrics.names_of
        info.add_metric(
            [
                str(slots),
                names(load.running_adapters) if load else "",
                names(load.waiting_adapters) if load else "",
            ],
            1,
        )
        yield info


def _adapter_families(reading: AdapterReading) -> Iterator[Metric]:
    counts = {tier: float(count) for tier, (count, _) in reading.tiers.items()}
    nbytes = {tier: float(size) for tier, (_, size) in reading.tiers.items()}
    yield _gauges(
        "loramux_adapters",
        "Adapters by place: versions on the device (resident), versions in host memory (loaded), names in the store "
        "(registered). One adapter may be in all three.",
        "tier",
        counts,
    )
    yield _gauges(
        "loramux_adapters_bytes",
        "Bytes of adapters by place: as uploaded (resident), of host memory (loaded), of files (registered).",
        "tier",
        nbytes,
    )
    yield GaugeMetricFamily("loramux_adapter_leases", "Leases on adapters in slots.", value=reading.leases)
    yield GaugeMetricFamily("loramux_pinned_adapters", "Versions to be kept on the device.", value=reading.pinned)
    yield _counters("loramux_adapter_loads", "Loads onto the device.", "outcome", reading.loads_total)
    yield CounterMetricFamily("loramux_adapter_load_seconds", "Time spent loading.", value=reading.load_seconds_total)
    yield _counters("loramux_adapter_evictions", "Adapters put out of a tier.", "tier", reading.evictions_total)
    yield CounterMetricFamily("loramux_adapter_hits", "Leases on a resident adapter.", value=reading.hits_total)
    yield CounterMetricFamily("loramux_adapter_lease_waits", "Leases that waited.", value=reading.lease_waits_total)
    yield GaugeMetricFamily("loramux_merged_adapters", "Adapters with merged weights.", value=reading.merged_adapters)
    yield GaugeMetricFamily("loramux_merged_bytes", "Bytes of merged weights.", value=reading.merged_bytes)
    yield _counters("loramux_merges", "Merges.", "outcome", reading.merges_total)


def _shortened(counts: Mapping[str, float]) -> dict[str, float]:
    """Digests as the other series, the log and the command line show them."""
    return {key[:DIGITS]: value for key, value in counts.items()}


def _histogram(registry: CollectorRegistry, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, text, buckets=buckets, registry=registry)


def _gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _counters(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
