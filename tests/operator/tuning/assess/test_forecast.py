"""The load that a replica will find once it serves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.operator.tuning.observations import NOW, context_of, counts, many, observe, replica

from kvpilot_operator.tuning.assess.forecast import expected, offered
from kvpilot_operator.tuning.observation import ObservedReplica
from kvpilot_operator.tuning.pace import PACES

PACE = PACES["Fast"]


def young(name: str, seconds: float, rate: float) -> ObservedReplica:
    """A replica that has served for less than a long window."""
    seen = replica(name)
    assert seen.sample is not None
    windows = {w: counts(min(seconds, length), rate=rate) for w, length in (("short", 10.0), ("long", 60.0))}
    sample = replace(seen.sample, windows=windows, coverage_s=seconds)
    return replace(seen, sample=sample, created_at=NOW - seconds - 5)


def test_what_arrives_is_added_up() -> None:
    assert offered(many(3, rate=10), "short") == pytest.approx(30)
    assert offered((), "short") == 0
    assert offered((replace(replica(), sample=None),), "short") == 0


def test_a_scale_out_does_not_change_the_load() -> None:
    """60 requests/s at two replicas for 40 s, and then at four of them."""
    old = many(2, rate=(40 * 30 + 20 * 15) / 60)
    new = (young("new-0", 20, 15), young("new-1", 20, 15))
    assert offered((*old, *new), "long") == pytest.approx(60)
    assert context_of(observe(*old, *new)).offered("long") == pytest.approx(60)


def test_a_deployment_that_is_all_new_is_measured_since_it_serves() -> None:
    both = (young("new-0", 20, 15), young("new-1", 12, 15))
    assert offered(both, "long") == pytest.approx((300 + 180) / 20)


def test_an_old_replica_without_metrics_gets_as_many_as_the_others() -> None:
    old, silent = many(3, rate=10), replace(replica("silent"), sample=None)
    assert offered(old, "short", unmeasured=1) == pytest.approx(40)
    assert context_of(observe(*old, silent)).offered("short") == pytest.approx(40)
    just_ready = replace(silent, created_at=NOW - 65)
    assert context_of(observe(*old, just_ready)).offered("short") == pytest.approx(30)


@pytest.mark.parametrize(
    ("short", "long", "horizon", "rate"),
    [
        (30.0, 30.0, 60.0, 30.0),
        (24.0, 30.0, 60.0, 30.0),  # falling: the busier window
        (31.5, 30.0, 60.0, 31.5),  # a rise within chance ends
        # 15 requests/s more within 25 s go on at 0.8 of it for 5 s, and from the middle of the window.
        (60.0, 45.0, 5.0, 60.0 + 0.8 * 15 / 25 * 10),
        (60.0, 30.0, 600.0, 75.0),  # at most 1.25 times as much
        (0.0, 0.0, 60.0, 0.0),
        (3.0, 0.0, 60.0, 3.75),  # the first requests of the day are expected to stay
    ],
)
def test_only_a_significant_rise_goes_on(short: float, long: float, horizon: float, rate: float) -> None:
    assert expected(short, long, PACE, horizon) == pytest.approx(rate)
