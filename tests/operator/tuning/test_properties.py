"""Properties of ``decide`` over histories of loads, faults, restarts, edits, lost actions and lost data."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.operator.tuning.invariants import Step
from tests.operator.tuning.paths import paths
from tests.operator.tuning.worlds import REGIMES, Regime, World

from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.state import Phase, TuningState

WORLDS, TICKS = 44, 40

RULES = {
    "workers": "workers-up",
    "batch": "batch-up",
    "step tokens": "step-tokens-up",
    "prefetch": "prefetch-up",
    "waste": "prefetch-down",
    "codec": "compression-down",
    "few hits": "cache-quota-up",
    "fixed strategy": "strategy-adaptive",
    "few blocks": "compression-up",
    "crowded": "workers-down",
    "memory": "memory-relief",
}
"""Regimes with a fault that a canary proves a cure of, and the rule that cures it."""

SCALES = {"saturated": "ScaledOut", "idle": "ScaledIn", "no traffic": "ScaledIn", "calm": "ScaledIn"}

TUNED = {"Promoted": 10, "Reverted": 10, "Aborted": 5, "widened": 10, "hold": 50, "untrusted": 20}
"""Paths of each regime in ``RULES``: together more than 50 of each in a run."""

TAKEN_BACK = 5
"""Changes that were taken back after their promotion, in each regime that shows a step rate."""


def required(regime: Regime) -> dict[str, int]:
    """How often each path must be taken in the worlds of a regime, or its properties hold for want of one."""
    if regime.name == "exhausted":
        return {"Emergency": 50, "taken back": 20, "pushed to all": 50}
    if regime.name == "wavering":
        return {"prefetch-up:Started": 50, "Reverted": 50, "FlapBudgetSpent": 20}
    if regime.name not in RULES:
        return {SCALES[regime.name]: 50, "hold": 10}
    shown = {"taken back": TAKEN_BACK} if "row_rate" in regime.figures else {}
    return {f"{RULES[regime.name]}:Started": 50, **TUNED, **shown}


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES, ids=[regime.name for regime in REGIMES])
def test_every_decision_is_safe(regime: Regime) -> None:
    taken: Counter[str] = Counter()
    # A look-back lasts long, so that the worlds in which replicas are scaled in must be more.
    for seed in range(2 * WORLDS if regime.name in SCALES else WORLDS):
        for step in World(seed, regime).ticks(TICKS):
            taken.update(paths(step))
    rare = {path: taken[path] for path, least in required(regime).items() if taken[path] < least}
    assert not rare, f"paths taken too seldom to prove anything: {rare} of {dict(taken)}"


def test_every_regime_says_which_paths_it_must_take() -> None:
    assert {regime.name for regime in REGIMES} == {*RULES, *SCALES, "exhausted", "wavering"}


@pytest.mark.parametrize("regime", REGIMES, ids=[regime.name for regime in REGIMES])
def test_calm_after_any_history_converges_to_the_promoted_configuration(regime: Regime) -> None:
    for seed in range(5):
        world = World(seed, regime, events=0.2)
        list(world.ticks(20))
        world.events, world.fault_left = 0.0, 0
        steps = list(world.ticks(60))
        last = next((step for step in reversed(steps) if _at_rest(step)), None)
        assert last is not None, seed
        assert last.observation.promoted is not None
        promoted = last.observation.promoted
        for item in last.observation.ready:
            assert item.engine is not None
            assert item.engine.generation == promoted.generation
            assert {name: item.engine.config[name] for name in promoted.config} == dict(promoted.config)
        overlaid = {**world.base, **{entry.knob: entry.value for entry in last.decision.state.overlay}}
        assert overlaid == promoted.config


def _at_rest(step: Step) -> bool:
    """True if nothing was in flight before the decision and nothing is after it."""
    return step.before.change is None and step.decision.state.change is None and not step.decision.actions


@pytest.mark.parametrize("regime", REGIMES, ids=[regime.name for regime in REGIMES])
def test_same_observation_again_changes_nothing_more(regime: Regime) -> None:
    for seed in range(3):
        for step in World(seed, regime, events=0.3).ticks(TICKS):
            state = step.decision.state
            recorded = {(record.id, record.outcome) for record in step.decision.records}
            for _ in range(4):  # a change that is overdue or aborted may take more reconciles to end
                again = decide(step.observation, state, step.policy, step.observation.at)
                more = {(record.id, record.outcome) for record in again.records}
                assert not more & recorded, "what was recorded is not recorded again"
                assert more <= {(record.id, "Aborted") for record in again.records}, "only an end is new"
                recorded |= more
                settled, state = again.state == state, again.state
                if settled:
                    break
            assert settled, (seed, step.observation.at)


@pytest.mark.parametrize("regime", REGIMES, ids=[regime.name for regime in REGIMES])
def test_lost_status_never_reuses_an_epoch_or_a_generation_in_use(regime: Regime) -> None:
    for seed in range(10):
        world = World(seed, regime)
        list(world.ticks(5 + 2 * seed))
        world.state = TuningState()
        observation = world.observe()
        decision = decide(observation, world.state, regime.policy, observation.at)
        shown = [r.engine for r in observation.replicas if r.engine is not None]
        if shown:
            assert decision.state.last_generation >= max(engine.generation for engine in shown)
            assert decision.state.epoch >= max(engine.epoch for engine in shown)
        assert decision.state.phase is not Phase.VERIFY
