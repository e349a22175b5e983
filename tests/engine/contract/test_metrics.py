"""The metric table agrees with itself and with what an engine samples."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest
from prometheus_client.core import CollectorRegistry
from prometheus_client.core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from kvpilot_engine.contract import KVCacheConfig, metrics
from kvpilot_engine.contract.metrics import METRICS, Metric, Samples, total
from kvpilot_engine.core.engine import Engine
from kvpilot_engine.memory import Memory
from kvpilot_engine.server.metrics import families

MEMORY = Memory(host_bytes=1, host_limit_bytes=2, device_bytes=0, device_limit_bytes=0)


@pytest.mark.parametrize("metric", METRICS.values())
def test_name_fits_its_type_and_help_is_a_sentence(metric: Metric) -> None:
    assert metric.startswith("kvpilot_")
    assert metric.endswith("_total") is (metric.type == "counter")
    assert re.fullmatch(r"[A-Z0-9].*\.", metric.help)


def test_every_constant_is_in_the_table_once() -> None:
    constants = [value for value in vars(metrics).values() if isinstance(value, Metric)]
    assert list(METRICS) == constants


def test_sampled_metrics_are_in_the_table_and_the_page_shows_their_help() -> None:
    engine = Engine(KVCacheConfig(dtype="float32", max_tokens=512))
    sampled = engine.sample("s")
    engine.close()
    assert {METRICS[name].type for name in sampled.counters} == {"counter"}
    assert {METRICS[name].type for name in sampled.gauges} == {"gauge"}
    page = generate_latest(Page(sampled.counters, sampled.gauges, MEMORY.gauges())).decode()
    shown = {family.name: family for family in text_string_to_metric_families(page)}
    for name in (*sampled.counters, *sampled.gauges, *MEMORY.gauges()):
        metric = METRICS[name]
        family = shown[name.removesuffix("_total")]
        assert (family.documentation, family.type) == (metric.help, metric.type)
        for label, known in metric.labels.items():
            assert set(known) <= {sample.labels[label] for sample in family.samples}


class Page(CollectorRegistry):
    """A registry that exposes given samples."""

    def __init__(self, *samples: Samples) -> None:
        super().__init__()
        self._samples = samples

    def collect(self) -> Iterator[Family]:
        for each in self._samples:
            yield from families(each)


def test_total_sums_over_the_label_and_is_zero_without_the_metric() -> None:
    samples = {metrics.CACHED_PAGES: {"pool": 3.0, "host": 4.0}}
    assert total(samples, metrics.CACHED_PAGES) == 7.0
    assert total(samples, metrics.CACHE_BYTES) == 0.0
