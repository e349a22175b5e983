"""What a proposal costs at the present load."""

from __future__ import annotations

from typing import Any

import pytest
from tests.operator.tuning.observations import BAD, NOW, context_of, gauges, observe, three
from tests.operator.tuning.policies import policy_of

from kvpilot_engine.contract.knobs import MIB, Price
from kvpilot_operator.tuning.context import Context, Proposal
from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.policy import Scaling
from kvpilot_operator.tuning.price import price_of
from kvpilot_operator.tuning.state import KnobChange, TuningState

TOKEN = 16 * 1024
"""Bytes of a token. 1,000 tokens/s are computed by each replica: 20 requests of 100, half of them hits."""


def seen(token_bytes: float = TOKEN, **policy: Any) -> Context:
    pods = three(hit=0.5, gauges=gauges(token_bytes=token_bytes))
    return context_of(observe(*pods), policy_of(**policy))


def change(*values: KnobChange) -> Proposal:
    return Proposal("any", values, "p95", 0.5, "why")


@pytest.mark.parametrize(
    ("values", "price"),
    [
        ((KnobChange("numWorkers", 2, 8), KnobChange("batchSize", 2, 8)), Price()),
        ((KnobChange("compressionRatio", 0.32, 0.52),), Price(cold_seconds=60)),
        # 2,048 tokens more are there after 2 s.
        ((KnobChange("maxTokens", 4096, 6144),), Price(cold_seconds=2.0, cache_bytes=2048 * TOKEN)),
        # The budget of both grows with the tier within it: its bytes count once.
        (
            (KnobChange("hostMemoryMb", 256, 384), KnobChange("maxMemoryMb", 512, 640)),
            Price(cold_seconds=8.2, cache_bytes=128 * MIB),
        ),
        # A cut drops what is cached beyond it: 200 MiB are.
        ((KnobChange("maxMemoryMb", None, 150),), Price(cold_seconds=3.2, cache_bytes=50 * MIB)),
    ],
)
def test_bytes_are_taken_or_dropped_and_the_cache_is_cold_until_they_are_computed(
    values: tuple[KnobChange, ...], price: Price
) -> None:
    assert price_of(seen(), change(*values)) == price


def test_without_figures_the_time_of_the_catalogue_holds() -> None:
    grown = change(KnobChange("hostMemoryMb", 256, 320))
    assert price_of(seen(0.0), grown) == Price(cold_seconds=60, cache_bytes=64 * MIB)


def test_a_replica_costs_its_gpus_and_its_start_and_gives_them_back_with_its_cache() -> None:
    policy = {"scaling": Scaling(1, 6, gpus=2)}
    out = Proposal("replicas-up", (), "", 0.0, "why", replicas=(3, 5))
    back = Proposal("replicas-down", (), "", 0.0, "why", replicas=(3, 2))
    assert price_of(seen(**policy), out) == Price(gpus=4, cold_seconds=60.0)
    assert price_of(seen(**policy), back) == Price(gpus=-2, cache_bytes=200 * MIB)


def test_the_record_of_a_beginning_has_its_price() -> None:
    pods = three(attained=BAD, stages={"admission_wait": 0.71, "prefill": 0.04, "decode": 0.25})
    decision = decide(observe(*pods, config={"numWorkers": 2}), TuningState(), policy_of(), NOW)
    assert [(item.outcome, item.price) for item in decision.records] == [("Started", Price())]
