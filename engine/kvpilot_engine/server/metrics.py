"""The engine's metrics: what the front counts itself, and the core's counters as they were a moment ago."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.metrics import Outcome, Stage
from kvpilot_engine.memory import Memory
from kvpilot_engine.protocol import Described, Finished, Sampled

SAMPLE_AGE_S = 0.5
"""A scrape may see counters of the core that are this old."""

_KEY = re.compile(r'^(\w+)(?:\{(\w+)="?([^}"]*)"?\})?$')
_TIERS = ("pool", "host")


@dataclass(frozen=True)
class Family:
    """One metric of the core: its help, its label, and the label's values that exist from the start."""

    name: str
    text: str
    label: str | None = None
    values: tuple[str, ...] = ()


COUNTERS = (
    Family(names.OUTPUT_TOKENS_TOTAL, "New tokens."),
    Family(names.QUERY_TOKENS_TOTAL, "Prompt tokens looked up in the cache."),
    Family(names.HIT_TOKENS_TOTAL, "Prompt tokens served from the cache.", "tier", _TIERS),
    Family(names.CEILING_TOKENS_TOTAL, "Prompt tokens that an infinite cache would have served."),
    Family(names.EVICTED_PAGES_TOTAL, "Pages evicted from the hot pool."),
    Family(names.PREEMPTIONS_TOTAL, "Sequences that lost their pages while running."),
    Family(names.BLOCKS_LOST_TOTAL, "Blocks dropped from the slower tiers or by a change.", "reason"),
    Family(names.PREFETCH_BLOCKS_TOTAL, "Blocks fetched ahead.", "result", ("used", "wasted")),
    Family(names.CODEC_SECONDS_TOTAL, "Time in codecs.", "op", ("encode", "decode")),
    Family(names.TIER_LOAD_BLOCKS_TOTAL, "Blocks loaded from a slower tier."),
    Family(names.STEPS_TOTAL, "Steps of the engine."),
    Family(names.STEP_BUSY_SECONDS_TOTAL, "Wall time in steps."),
    Family(names.STEP_ROWS_TOTAL, "Sequences in a step, summed over steps."),
)
GAUGES = (
    Family(names.CACHED_PAGES, "Pages held now.", "tier", _TIERS),
    Family(names.CACHE_BYTES, "Bytes held now.", "tier", _TIERS),
    Family(names.CACHE_BUDGET_BYTES, "Bytes that may be held.", "tier", _TIERS),
    Family(names.STEP_CURVE_SECONDS, "Measured time of a decode step by rows.", "rows"),
    Family(names.STEP_MARGINAL_GAIN, "Relative gain of tokens/s from one more sequence."),
    Family(names.REQUESTS_WAITING, "Requests without a worker slot, or without pages for their prompt."),
    Family(names.REQUESTS_RUNNING, "Requests with a worker slot and pages."),
    Family(names.CONFIG_GENERATION, "Generation of the configuration in force."),
    Family(names.CONFIG_CONVERGING, "1 while a lowered quota is not reached."),
)


def split_key(key: str) -> tuple[str, str | None, str]:
    """``name{label=value}`` in its three parts; label None for a bare name."""
    match = _KEY.match(key)
    if match is None:
        raise ValueError(f"sample key: must be name or name{{label=value}}, got {key!r}")
    return match[1], match[2], match[3] or ""


class CoreCollector(Collector):
    """Presents the last sample of the core to prometheus_client."""

    def __init__(self, latest: Callable[[], tuple[Sampled, Memory] | None]) -> None:
        self._latest = latest

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """All families of the core, each label value from the start."""
        latest = self._latest()
        if latest is None:
            return
        sampled, memory = latest
        for family, values in _grouped(COUNTERS, sampled.counters):
            counter = CounterMetricFamily(family.name, family.text, labels=_labels(family))
            for label, value in values.items():
                counter.add_metric([label] if family.label else [], value)
            yield counter
        for family, values in _grouped(GAUGES, sampled.gauges):
            gauge = GaugeMetricFamily(family.name, family.text, labels=_labels(family))
            for label, value in values.items():
                gauge.add_metric([label] if family.label else [], value)
            yield gauge
        yield from _memory_families(memory)


def _labels(family: Family) -> list[str]:
    return [family.label] if family.label else []


def _grouped(
    families: tuple[Family, ...], sample: dict[str, float]
) -> Iterator[tuple[Family, dict[str, float]]]:
    """Each family with its values by label; what the core names beyond the table follows as it is."""
    known = {family.name: family for family in families}
    values: dict[str, dict[str, float]] = {
        family.name: dict.fromkeys(family.values if family.label else ("",), 0.0) for family in families
    }
    for key, value in sample.items():
        name, label, label_value = split_key(key)
        if name not in known:
            known[name] = Family(name, "Of the core.", label)
            values[name] = {}
        values[name][label_value] = value
    return ((known[name], by_label) for name, by_label in values.items())


def _memory_families(memory: Memory) -> Iterator[GaugeMetricFamily]:
    rows = (
        (names.MEMORY_RATIO, "Used memory over its limit.", memory.host_ratio, memory.device_ratio),
        (names.MEMORY_BYTES, "Used memory.", memory.host_bytes, memory.device_bytes),
        (names.MEMORY_LIMIT_BYTES, "Limit.", memory.host_limit_bytes, memory.device_limit_bytes),
    )
    for name, text, host, device in rows:
        gauge = GaugeMetricFamily(name, text, labels=["kind"])
        gauge.add_metric(["host"], host)
        gauge.add_metric(["device"], device)
        yield gauge


class FrontMetrics:
    """What the front counts: arrivals, ends, latencies, stages."""

    def __init__(self, latest: Callable[[], tuple[Sampled, Memory] | None]) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.arrivals = Counter(
            names.ARRIVALS_TOTAL.removesuffix("_total"), "Requests that arrived.", registry=self.registry
        )
        requests = Counter(
            names.REQUESTS_TOTAL.removesuffix("_total"),
            "Requests that ended.",
            ["outcome"],
            registry=self.registry,
        )
        self.outcomes = {outcome: requests.labels(outcome.value) for outcome in Outcome}
        self.request_seconds = self._histogram(
            names.REQUEST_SECONDS, "Arrival to last byte of successful requests, s."
        )
        self.first_token_seconds = self._histogram(
            names.FIRST_TOKEN_SECONDS, "Arrival to first new token of successful requests, s."
        )
        self.inter_token_seconds = self._histogram(
            names.INTER_TOKEN_SECONDS, "Between consecutive tokens of successful requests, s."
        )
        stages = self._histogram(
            names.STAGE_SECONDS, "Time of successful requests in each stage, s.", ["stage"]
        )
        self._stages = {stage.value: stages.labels(stage.value) for stage in Stage}
        self.registry.register(CoreCollector(latest))

    def _histogram(self, name: str, text: str, labels: list[str] | None = None) -> Histogram:
        return Histogram(name, text, labels or [], buckets=names.EDGES_S, registry=self.registry)

    def info(self, described: Described, version: str, contract: int) -> None:
        """Publish what runs here."""
        gauge = prometheus_client.Gauge(
            names.ENGINE_INFO, "1.", ["version", "model", "device", "contract"], registry=self.registry
        )
        gauge.labels(version, described.model, described.device, str(contract)).set(1)

    def succeeded(
        self, finished: Finished, request_s: float, first_token_s: float | None, gaps_s: list[float]
    ) -> None:
        """Count a request that ended well."""
        self.outcomes[Outcome.OK].inc()
        self.request_seconds.observe(request_s)
        if first_token_s is not None:
            self.first_token_seconds.observe(first_token_s)
        for gap in gaps_s:
            self.inter_token_seconds.observe(gap)
        for name, histogram in self._stages.items():
            histogram.observe(finished.stages.get(name, 0.0))

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry)
