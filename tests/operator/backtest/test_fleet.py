"""A rule that does harm: reverted, blocked, explained on each resource, then only recommended everywhere."""

from __future__ import annotations

from tests.operator.backtest.simulations import assert_settled, spec_of
from tests.operator.tuning.policies import PRODUCTION

from kvpilot_operator.backtest.devices import Device, Work
from kvpilot_operator.backtest.loads import Mix, step, synthetic
from kvpilot_operator.backtest.model import Fault
from kvpilot_operator.backtest.simulation import START, Simulation
from kvpilot_operator.reconcile.fleet import Fleet
from kvpilot_operator.status.explain import explain
from kvpilot_operator.tuning.state import Phase

CONFIG = {"numWorkers": 2, "batchSize": 8}
SLOWER = 3.0
"""What more workers multiply the step time by: the rule that proposes them is planted."""


class Resources:
    """Resources of one operator that breach one after the other."""

    def __init__(self) -> None:
        self.now = START
        self.fleet = Fleet(lambda: self.now, rules="same")

    def next(self, index: int) -> Simulation:
        mix = Mix()
        work = Work(mix.prompt * (1 - mix.cached), mix.out)
        device = Device.fitting([work], PRODUCTION)
        full = 2 * device.capacity(work, CONFIG)
        return Simulation(
            {
                "apiVersion": "kvpilot.io/v1alpha1",
                "kind": "KVCacheDeployment",
                "metadata": {"name": f"chat-{index}", "namespace": "default", "uid": "u", "generation": 1},
                "spec": spec_of(CONFIG, replicas=2),
            },
            replicas=2,
            requests=synthetic(step(0.5 * full, full, 60.0), 500.0, mix, index),
            model=device.model(Fault({"numWorkers": 2.0}, slower=SLOWER, inert=True)),
            seed=index,
            fleet=self.fleet,
        )

    def run(self, sim: Simulation, seconds: float, outcome: str) -> None:
        def ended(one: Simulation) -> bool:
            self.now = one.cluster.now
            return outcome in one.outcomes() and one.state.phase is not Phase.REVERT

        sim.run(seconds, until=ended)


def test_a_harmful_rule_is_reverted_blocked_explained_and_after_three_only_recommended() -> None:
    resources = Resources()
    for index in range(3):
        sim = resources.next(index)
        assert resources.fleet.recommend_only() == frozenset()
        resources.run(sim, 300, "Reverted")
        harmed = next(record for record in sim.records if record.outcome == "Reverted")
        assert (harmed.rule, harmed.evidence["verdict"]) == ("workers-up", "Harmful"), sim.report()
        (blocked,) = sim.state.blocked_values
        assert (blocked.knob, blocked.value) == ("numWorkers", harmed.changes[0].after)
        assert_settled(sim)
        explained = explain(sim.cluster.manifest, now=sim.cluster.now)
        assert any("was reverted (Harmful)" in action.summary for action in explained.actions)
        assert any("numWorkers" in sentence and "blocked until" in sentence for sentence in explained.why_not)
    assert "RuleOnlyRecommended" in [event.reason for event in sim.cluster.events]
    last = resources.next(3)
    resources.run(last, 300, "Recommended")
    assert "Started" not in last.outcomes(), last.report()
    holds = {hold.reason for hold in last.state.holds}
    assert "RuleOnlyRecommended" in holds


def test_the_kill_switch_leaves_no_candidate_running() -> None:
    resources = Resources()
    sim = resources.next(0)
    resources.run(sim, 300, "Started")
    assert {engine.generation for engine in sim.cluster.engines} == {1, 2}
    resources.fleet.off = "the operator runs with --tuning=off"
    sim.run(20)
    assert_settled(sim)
    condition = sim.cluster.snapshot().status.condition("TuningActive")
    assert condition is not None
    assert (condition.status, condition.reason) == ("False", "KillSwitch")
    before = len(sim.records)
    sim.run(120)
    assert len(sim.records) == before, "nothing begins while it is off"
    resources.fleet.off = ""
    resources.run(sim, 120, "Reverted")
    assert sim.outcomes().count("Started") == 2, "it goes on afterwards"
