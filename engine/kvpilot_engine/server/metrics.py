"""The metrics page: the front's account, and the last sample of the core, under the names of the contract."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvpilot_engine.contract import CONTRACT_VERSION, VERSION
from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.metrics import METRICS, Samples
from kvpilot_engine.frontend.account import Account
from kvpilot_engine.frontend.session import Session
from kvpilot_engine.ipc.messages import Described, Sampled
from kvpilot_engine.memory import Memory

SAMPLE_AGE_S = 0.5
"""Greatest age of the core's counters on the page: the core is asked at most twice a second."""


class MetricsPage(Collector):
    """Everything measured of one engine, in Prometheus' text format."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._latest: tuple[Sampled, Memory] | None = None
        self._sampled_at = -math.inf
        self._sampling: asyncio.Task[None] | None = None
        self._registry = CollectorRegistry()
        self._registry.register(self)

    async def text(self) -> bytes:
        """The page; until the core is ready it holds the front's account only.

        Raises:
            CoreUnavailableError: the core is gone.
        """
        if self._session.client is not None and time.monotonic() - self._sampled_at > SAMPLE_AGE_S:
            if self._sampling is None or self._sampling.done():
                self._sampling = asyncio.ensure_future(self._sample())
            await asyncio.shield(self._sampling)
        return prometheus_client.generate_latest(self._registry)

    async def _sample(self) -> None:
        self._latest = await self._session.sample()
        self._sampled_at = time.monotonic()

    def collect(self) -> Iterator[Metric]:
        """All families; label values that are known in advance are there from the start."""
        account = self._session.account
        yield from families(account.counters())
        yield from _histograms(account)
        if self._session.client is not None:
            yield _info(self._session.client.described)
        if self._latest is not None:
            sampled, memory = self._latest
            for samples in (sampled.counters, sampled.gauges, memory.gauges()):
                yield from families(samples)


def families(samples: Samples) -> Iterator[Metric]:
    """Counters and gauges as prometheus_client exposes them."""
    for name, values in samples.items():
        metric = METRICS[name]
        labels = list(metric.labels)
        kind = CounterMetricFamily if metric.type == "counter" else GaugeMetricFamily
        family = kind(metric, metric.help, labels=labels)
        known = dict.fromkeys(metric.labels[labels[0]], 0.0) if labels else {}
        for value, number in (known | dict(values)).items():
            family.add_metric([value] if labels else [], number)
        yield family


def _histograms(account: Account) -> Iterator[Metric]:
    for name, by_label in account.histograms().items():
        metric = METRICS[name]
        family = HistogramMetricFamily(metric, metric.help, labels=list(metric.labels))
        for value, histogram in by_label.items():
            buckets = [("+Inf" if edge == math.inf else str(edge), n) for edge, n in histogram.buckets()]
            family.add_metric([value] if metric.labels else [], buckets, histogram.sum_s)
        yield family


def _info(described: Described) -> Metric:
    metric = names.ENGINE_INFO
    family = GaugeMetricFamily(metric, metric.help, labels=list(metric.labels))
    family.add_metric([VERSION, described.model, described.device, str(CONTRACT_VERSION)], 1)
    return family
