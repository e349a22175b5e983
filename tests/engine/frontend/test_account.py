"""The account of requests: histograms, stages and the estimate of Retry-After."""

from __future__ import annotations

import math

import pytest

from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.metrics import EDGES_S, Outcome, Stage
from kvpilot_engine.frontend.account import Account, Completed


def completed(at: float, latency_s: float = 0.05, **stages: float) -> Completed:
    return Completed(at, latency_s, first_token_s=None, stages=stages)


def test_buckets_are_cumulative_and_include_their_edge() -> None:
    account = Account()
    for latency_s in (EDGES_S[0], EDGES_S[0] + 0.01, EDGES_S[-1] + 1):
        account.complete(completed(0.0, latency_s), ())
    histogram = account.histograms()[names.REQUEST_SECONDS][""]
    assert histogram.buckets()[0] == (EDGES_S[0], 1)
    assert histogram.buckets()[-2:] == [(EDGES_S[-1], 2), (math.inf, 3)]
    assert histogram.sum_s == pytest.approx(2 * EDGES_S[0] + 0.01 + EDGES_S[-1] + 1)


def test_success_counts_in_every_stage_and_gaps_in_their_own_histogram() -> None:
    account = Account()
    account.complete(completed(0.0, decode=0.2), (0.01, 0.02))
    histograms = account.histograms()
    counts = {
        stage: histogram.buckets()[-1][1] for stage, histogram in histograms[names.STAGE_SECONDS].items()
    }
    assert counts == dict.fromkeys(Stage, 1)
    assert histograms[names.STAGE_SECONDS][Stage.DECODE].sum_s == 0.2
    assert histograms[names.INTER_TOKEN_SECONDS][""].buckets()[-1][1] == 2
    assert histograms[names.FIRST_TOKEN_SECONDS][""].buckets()[-1][1] == 0
    assert account.counters()[names.REQUESTS_TOTAL] == dict.fromkeys(Outcome, 0) | {Outcome.OK: 1}


@pytest.mark.parametrize(
    ("ends", "waiting", "seconds"),
    [
        ((), 5, 1),
        ((0.0,), 5, 1),
        ((0.0, 2.0, 4.0), 5, 10),
        ((0.0, 0.01), 5, 1),
        ((0.0, 20.0), 5, 30),
    ],
)
def test_retry_after_is_the_time_in_which_the_queue_drains(
    ends: tuple[float, ...], waiting: int, seconds: int
) -> None:
    account = Account()
    for at in ends:
        account.complete(completed(at), ())
    assert account.retry_after_s(waiting) == seconds


def test_retry_after_uses_the_latest_completions_only() -> None:
    account = Account(recent=10_000)
    for at in (0.0, 1000.0):
        account.complete(completed(at), ())
    for i in range(64):
        account.complete(completed(2000.0 + i), ())
    assert account.retry_after_s(5) == 5
