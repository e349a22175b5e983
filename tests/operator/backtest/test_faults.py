"""Faults beside the load: what they do to replicas and metrics, and to kvpilot."""

from __future__ import annotations

from typing import Any

import pytest
from tests.operator.backtest.simulations import WIDE, assert_settled, simulate

from kvpilot_operator.backtest.faults import TimedFault, parse_faults
from kvpilot_operator.backtest.simulation import Simulation
from kvpilot_operator.options import OptionError
from kvpilot_operator.tuning.observation import Counts, Sample


def samples(sim: Simulation, length: float = 30.0) -> dict[str, Sample]:
    return sim.cluster.measured({"window": length})


def window(sim: Simulation, uid: str, length: float = 30.0) -> Counts:
    return samples(sim, length)[uid].windows["window"]


def faulty(name: Any, **options: Any) -> Simulation:
    return simulate(WIDE, load=lambda _: 30.0, faults=[TimedFault(name, 60.0, 60.0)], **options).run(100)


def test_slow_replica_takes_longer_for_the_same_rows() -> None:
    sim = faulty("slow")
    slow, well = window(sim, "u0"), window(sim, "u1")
    assert slow.busy_seconds / slow.steps > 1.5 * well.busy_seconds / well.steps


def test_hung_replica_is_scraped_and_takes_no_steps() -> None:
    sim = faulty("hung")
    assert (window(sim, "u0").steps, window(sim, "u0").arrivals > 0) == (0, True)
    assert samples(sim)["u0"].age_s == 0


def test_silent_replica_has_no_series() -> None:
    assert set(samples(faulty("silent"))) == {"u1", "u2"}


def test_stale_replica_grows_older() -> None:
    found = samples(faulty("stale"))
    assert (found["u0"].age_s, found["u1"].age_s) == (pytest.approx(40, abs=2), 0)


def test_gap_leaves_windows_uncovered_afterwards() -> None:
    sim = faulty("gap").run(40)
    found = window(sim, "u1", 60.0)
    assert found.replica_seconds == pytest.approx(20, abs=2)
    assert found.arrivals == pytest.approx(20 * 10, rel=0.2), "what came in the gap is in no window"


def test_restarted_replica_serves_again_after_its_start() -> None:
    sim = simulate(WIDE, load=lambda _: 30.0, faults=[TimedFault("restart", 60.0, 60.0)], start_s=10.0)
    sim.run(64)
    assert [engine.restarts for engine in sim.cluster.engines] == [1, 0, 0]
    assert len(sim.cluster.ready(sim.cluster.now)) == 2
    sim.run(20)
    assert len(sim.cluster.ready(sim.cluster.now)) == 3
    assert samples(sim)["u0"].coverage_s < 20, "it is young"


def test_outage_ends_and_nothing_was_changed() -> None:
    sim = faulty("outage")
    assert sim.cluster.metrics_problem is not None
    sim.run(60)
    assert sim.cluster.metrics_problem is None
    assert sim.records == []
    assert_settled(sim)


def test_draining_replica_finishes_its_requests_and_is_paid_for() -> None:
    sim = simulate(WIDE, load=lambda _: 60.0, replicas=3)
    sim.run(30)
    for engine in sim.cluster.engines:
        engine.outlier = 50.0
    sim.run(2)
    paid = sim.cluster.paid_s()
    sim.cluster.resize(2)
    assert [replica.terminating for replica in sim.cluster.snapshot().replicas] == [False, False, True]
    left = sim.cluster.draining[0][1]
    inside = left.inside
    assert inside > 0
    while sim.cluster.draining:
        sim.run(2)
    assert left.inside == 0
    assert sim.cluster.paid_s() - paid > 2 * 2
    assert all(replica.terminating is False for replica in sim.cluster.snapshot().replicas)


def test_faults_are_parsed() -> None:
    assert parse_faults("slow, outage@600 ,gap@1.5+20") == (
        TimedFault("slow", 0.0, 300.0),
        TimedFault("outage", 600.0, 300.0),
        TimedFault("gap", 1.5, 20.0),
    )


@pytest.mark.parametrize("text", ["fire", "slow@", "slow@-1", "slow+x", "slow@1@2"])
def test_invalid_fault_names_what_is_allowed(text: str) -> None:
    with pytest.raises(OptionError, match=r"--faults: must be NAME.*slow, hung, silent.*got"):
        parse_faults(text)
