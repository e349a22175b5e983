"""Planted mutants of the core: each breaks one promise, and the invariants must notice every one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from tests.operator.tuning import worlds
from tests.operator.tuning.worlds import FIXED, REGIMES, World

from kvpilot_operator.tuning import base_change, decide, reasons, replicas
from kvpilot_operator.tuning.assess import guards
from kvpilot_operator.tuning.configuration import candidate
from kvpilot_operator.tuning.context import Context, Draft, Plan, Proposal
from kvpilot_operator.tuning.decision import Scale, WriteConfig
from kvpilot_operator.tuning.experiment import canary, ends
from kvpilot_operator.tuning.experiment.verdict import Verdict
from kvpilot_operator.tuning.rules import bounds, cache, compute, order
from kvpilot_operator.tuning.rules.bounds import Room
from kvpilot_operator.tuning.state import Change, Phase

SEEDS, TICKS = 25, 40
"""Worlds of each regime that a mutant may survive at most, and their length."""

Patch = pytest.MonkeyPatch


def scale_in_without_data(patch: Patch) -> None:
    """What cannot be trusted is taken for idle, and a scale-in needs no trust."""
    blocks, hold = Context.blocks, decide.hold

    def told(context: Context, draft: Draft) -> Draft:
        for reason, message in blocks.__get__(context):
            draft = draft.held(context, reason, message)
        return hold(context, draft)

    patch.setattr(decide, "hold", told)
    patch.setattr(Context, "blocks", property(lambda self: ()))


def scale_in_by_more_than_the_surplus(patch: Patch) -> None:
    plain = replicas.replicas_down

    def greedy(context: Context, state: Any, plan: Plan) -> Any:
        found = plain(context, state, plan)
        if isinstance(found, Proposal) and found.replicas is not None:
            return replace(found, replicas=(found.replicas[0], max(1, found.replicas[1] - 1)))
        return found

    _remedy(patch, "replicas-down", greedy)


def scale_in_of_the_whole_surplus(patch: Patch) -> None:
    patch.setattr(replicas, "SURPLUS_PART", 1.0)


def scale_in_without_a_look_back(patch: Patch) -> None:
    plain = replicas._marked

    def hasty(context: Context, draft: Draft, needed: int) -> Draft:
        draft = plain(context, draft, needed)
        early = tuple(
            replace(mark, at=context.now - 1000, replicas=needed) for mark in draft.state.scale_down
        )
        return draft.with_state(scale_down=early)

    patch.setattr(replicas, "_marked", hasty)


def promotion_without_evidence(patch: Patch) -> None:
    def judged(context: Context, change: Change) -> tuple[Change, Verdict]:
        found = {} if context.now - change.started_at < 10 else {"asked": "nobody"}
        return change, Verdict(reasons.PROMOTED if found else "", "it will be fine", found)

    patch.setattr(canary, "judge_change", judged)


def promotion_to_half_without_a_look_for_harm(patch: Patch) -> None:
    def blind(context: Context, draft: Draft, change: Change, verdict: Verdict) -> Draft:
        return ends.accept(context, draft, change, replace(verdict, name=reasons.PROMOTED, aborted=False))

    patch.setattr(canary, "_verified_widely", blind)
    patch.setattr(
        canary, "_verified", lambda context, draft, change: blind(context, draft, *_any(context, change))
    )


def _any(context: Context, change: Change) -> tuple[Change, Verdict]:
    return canary.judge_change(context, change)


def two_changes_in_flight(patch: Patch) -> None:
    plain = decide._experiment

    def eager(context: Context, draft: Draft, plan: Plan) -> Draft:
        return plain(context, draft.with_state(change=None, watch=None, cooldown_until=0.0), plan)

    patch.setattr(decide, "_experiment", eager)


def a_change_while_the_last_one_is_watched(patch: Patch) -> None:
    plain = decide._experiment

    def eager(context: Context, draft: Draft, plan: Plan) -> Draft:
        seen = draft.state.watch
        free = draft.with_state(watch=None, cooldown_until=0.0)
        after = plain(context, free, plan)
        return after if after.state.change is not draft.state.change else after.with_state(watch=seen)

    patch.setattr(decide, "_experiment", eager)


def forgotten_bound(patch: Patch) -> None:
    plain = bounds.room

    def endless(context: Context, knob: str) -> Room:
        return replace(plain(context, knob), minimum=1, maximum=1_000_000)

    for name in ("compute", "bounds"):
        patch.setattr(f"kvpilot_operator.tuning.rules.{name}.room", endless)


def push_to_others_than_the_canary(patch: Patch) -> None:
    patch.setattr(decide, "_tries", lambda replica, change, phase: phase is not Phase.REVERT)


def skipped_epoch(patch: Patch) -> None:
    plain = Draft.new_change

    def same(self: Draft, context: Context, proposal: Proposal, **fields: Any) -> Change:
        return replace(plain(self, context, proposal, **fields), epoch=self.state.epoch)

    patch.setattr(Draft, "new_change", same)


def stale_epoch(patch: Patch) -> None:
    """The epochs of engines are not looked at: a lost status goes on from 0."""
    plain = base_change.remember

    def forgetful(context: Context, draft: Draft) -> Draft:
        return plain(context, draft).with_state(epoch=draft.state.epoch)

    patch.setattr(decide, "remember", forgetful)


def reused_generation(patch: Patch) -> None:
    plain = Draft.new_change

    def again(self: Draft, context: Context, proposal: Proposal, **fields: Any) -> Change:
        made = plain(self, context, proposal, **fields)
        return replace(made, generation=max(2, self.state.last_generation))

    patch.setattr(Draft, "new_change", again)


def pause_ignored(patch: Patch) -> None:
    plain = decide.assess

    def deaf(observation: Any, *rest: Any) -> Context:
        return plain(replace(observation, paused_by=""), *rest)

    patch.setattr(decide, "assess", deaf)


def mode_ignored(patch: Patch) -> None:
    def act(
        context: Context, draft: Draft, proposal: Proposal, rejected: Any, how: Any, *, urgent: bool = False
    ) -> Draft:
        return how(context, draft, proposal)  # type: ignore[no-any-return]

    patch.setattr(decide, "carry_out", act)
    patch.setattr(decide, "revoke", lambda context, draft: draft)


def blocked_value_retried(patch: Patch) -> None:
    patch.setattr(bounds, "is_blocked", lambda *given: False)


def flap_budget_ignored(patch: Patch) -> None:
    patch.setattr(bounds, "flap_budget_spent", lambda *given: False)


def cooldown_ignored(patch: Patch) -> None:
    plain = decide._experiment

    def eager(context: Context, draft: Draft, plan: Plan) -> Draft:
        kept = draft.state.cooldown_until
        after = plain(context, draft.with_state(cooldown_until=0.0), plan)
        return (
            after if after.state.change is not draft.state.change else after.with_state(cooldown_until=kept)
        )

    patch.setattr(decide, "_experiment", eager)


def capacity_held_by_one_young_replica(patch: Patch) -> None:
    patch.setattr(Context, "urgent_blocks", Context.blocks)


def capacity_is_never_added(patch: Patch) -> None:
    _remedy(patch, "replicas-up", lambda context, state, plan: (reasons.NOT_AT_FAULT, "never"))


def never_reverting(patch: Patch) -> None:
    for module in (canary, ends):
        patch.setattr(module, "give_up", lambda context, draft, verdict: draft)


def written_before_all_run_it(patch: Patch) -> None:
    plain = canary._promoted

    def hasty(context: Context, draft: Draft, change: Change) -> Draft:
        promoted = context.observation.promoted
        if promoted is None or promoted.generation == change.generation:
            return plain(context, draft, change)
        return draft.acting(WriteConfig(change.generation, candidate(promoted.config, change.values)))

    patch.setattr(canary, "_promoted", hasty)


def experiment_without_a_breach(patch: Patch) -> None:
    plain = order.consider

    def bored(context: Context, state: Any) -> Plan:
        plan = plain(context, state)
        change = bounds.room(context, "prefetchSize").to(16)
        idle = Proposal("prefetch-up", (change,), "p95", 0.5, "why not", measure="tierLoad")
        return plan if plan.canary is not None or context.policy.mode == "Off" else replace(plan, canary=idle)

    patch.setattr(decide, "consider", bored)


def emergency_without_need(patch: Patch) -> None:
    patch.setattr("kvpilot_operator.tuning.rules.memory.EMERGENCY_MEMORY", 0.5)


def scales_against_another_manager(patch: Patch) -> None:
    plain = decide.keep_bounds

    def stubborn(context: Context, draft: Draft) -> Draft:
        asked = context.observation.desired_replicas
        managed = context.observation.replicas_managed_by and asked < 8
        draft = plain(context, draft)
        return draft.acting(Scale(asked + 1, "replicas-up")) if managed else draft

    patch.setattr(decide, "keep_bounds", stubborn)


# Of what the user permits, and of what is told


def disabled_rule_used(patch: Patch) -> None:
    plain = order.consider

    def deaf(context: Context, state: Any) -> Plan:
        return plain(replace(context, policy=replace(context.policy, disabled_rules=frozenset())), state)

    patch.setattr(decide, "consider", deaf)


def excluded_knob_tuned(patch: Patch) -> None:
    _room(patch, lambda found: replace(found, tunable=True))


def direction_ignored(patch: Patch) -> None:
    patch.setattr(bounds, "_direction", lambda context, change: None)
    plain = bounds.room

    def free(context: Context, knob: str) -> Room:
        known = {name: replace(item, direction="Both") for name, item in context.policy.bounds.items()}
        return plain(replace(context, policy=replace(context.policy, bounds=known)), knob)

    for module in (bounds, compute, cache):
        patch.setattr(module, "room", free)


def forgotten_lower_bound(patch: Patch) -> None:
    _room(patch, lambda found: replace(found, minimum=1))


def wasted_prefetches_doubled(patch: Patch) -> None:
    """A rule that has to lower its knob raises it."""
    plain = cache.prefetch_down

    def more(context: Context, state: Any, plan: Plan) -> Any:
        found = plain(context)
        if not isinstance(found, Proposal):
            return found
        change = found.values[0]
        return replace(found, values=(replace(change, after=2 * change.before),))

    _remedy(patch, "prefetch-down", more)


def workers_taken_while_requests_wait(patch: Patch) -> None:
    """A rule acts on a stage that is not at fault."""

    def fewer(context: Context, state: Any, plan: Plan) -> Any:
        workers = bounds.room(context, "numWorkers")
        objective = context.diagnosis.objective
        if not objective or workers.now <= workers.minimum:
            return reasons.NOT_AT_FAULT, "all is well"
        return Proposal(
            "workers-down", (workers.to(workers.now // 2),), objective, 0.5, "fewer", measure="seconds"
        )

    _remedy(patch, "workers-up", lambda context, state, plan: (reasons.NOT_AT_FAULT, "never"))
    _remedy(patch, "workers-down", fewer)


def memory_over_its_limit_is_no_fault(patch: Patch) -> None:
    """Requests that wait get more workers although memory is over its limit."""
    plain = decide.diagnose

    def blind(observation: Any, objectives: Any, *given: Any, **named: Any) -> Any:
        return plain(observation, tuple(o for o in objectives if o.name != "memory"), *given, **named)

    patch.setattr(decide, "diagnose", blind)
    for name in ("memory-relief", "memory-emergency"):
        _remedy(patch, name, lambda context, state, plan: (reasons.NOT_AT_FAULT, "never"))


def promotion_without_the_controls(patch: Patch) -> None:
    """Controls that can no longer be measured are not missed."""
    patch.setattr(canary, "_seen", lambda context, change: replace(change, unseen_since=0.0))
    patch.setattr(canary, "_measured", lambda context, change: True)
    patch.setattr(canary, "_verified", _trusting)


def _trusting(context: Context, draft: Draft, change: Change) -> Draft:
    if context.now - change.measured_from < context.policy.pace.settle:
        return draft
    return ends.accept(context, draft, change, Verdict(reasons.PROMOTED, "it looks good", {"gain": 1.0}))


def hold_is_not_told(patch: Patch) -> None:
    plain = decide.conclude
    patch.setattr(
        decide, "conclude", lambda context, draft, before: plain(context, replace(draft, holds=()), before)
    )


def hold_begins_again(patch: Patch) -> None:
    plain = Draft.held

    def forgetful(self: Draft, context: Context, reason: str, message: str) -> Draft:
        held = plain(self.with_state(holds=()), context, reason, message)
        return replace(held, state=self.state)

    patch.setattr(Draft, "held", forgetful)


def _room(patch: Patch, change: Callable[[Room], Room]) -> None:
    """Let rules and their check take a knob's room for another."""
    plain = bounds.room
    for module in (bounds, compute, cache):
        patch.setattr(module, "room", lambda context, knob: change(plain(context, knob)))


def _remedy(patch: Patch, name: str, find: Callable[..., Any]) -> None:
    """Put another finder into the list of remedies."""
    found = tuple(replace(item, find=find) if item.name == name else item for item in order.REMEDIES)
    patch.setattr(order, "REMEDIES", found)


@dataclass(frozen=True)
class Mutant:
    """A mutant, the regimes that it is looked for in, and what is said when it is found.

    Attributes:
        change: what the regimes have of their own there.
    """

    plant: Callable[[Patch], None]
    regimes: tuple[str, ...]
    says: str
    change: Mapping[str, Any] = field(default_factory=dict)


def _bounded(knob: str, **limits: Any) -> dict[str, Any]:
    """A regime whose policy bounds one knob otherwise."""
    known = {**FIXED.bounds, knob: replace(FIXED.bounds[knob], **limits)}
    return {"policy": replace(FIXED, bounds=known)}


MUTANTS = (
    Mutant(scale_in_without_data, ("idle", "no traffic"), "no scale-in without data|too few can be trusted"),
    Mutant(scale_in_by_more_than_the_surplus, ("idle",), "a part of the surplus|stays"),
    Mutant(scale_in_of_the_whole_surplus, ("idle",), "a part of the surplus"),
    Mutant(scale_in_without_a_look_back, ("saturated", "calm", "idle"), "no scale-in|stays|surplus"),
    Mutant(promotion_without_evidence, ("workers", "prefetch", "memory"), "promoted what"),
    Mutant(promotion_to_half_without_a_look_for_harm, ("workers", "prefetch"), "promoted what"),
    Mutant(two_changes_in_flight, ("workers", "batch"), "one change in flight|watched|cooldown"),
    Mutant(a_change_while_the_last_one_is_watched, ("workers", "few hits"), "in flight|watched|cooldown"),
    Mutant(forgotten_bound, ("workers",), "numWorkers"),
    Mutant(push_to_others_than_the_canary, ("workers",), "the candidate runs on the canary alone"),
    Mutant(skipped_epoch, ("workers",), "fences off"),
    Mutant(stale_epoch, ("workers", "prefetch"), "no engine refuses it"),
    Mutant(reused_generation, ("workers", "prefetch"), "a new name|used again"),
    Mutant(pause_ignored, ("workers", "saturated"), "a pause|no candidate stays"),
    Mutant(mode_ignored, ("workers", "saturated"), "mode|no candidate stays"),
    Mutant(blocked_value_retried, ("workers", "prefetch", "memory"), "failed less than a day ago"),
    Mutant(flap_budget_ignored, ("wavering",), "the flap budget"),
    Mutant(cooldown_ignored, ("workers", "prefetch"), "the cooldown|one change in flight"),
    Mutant(capacity_held_by_one_young_replica, ("saturated",), "nothing is added"),
    Mutant(capacity_is_never_added, ("saturated",), "nothing is added"),
    Mutant(never_reverting, ("workers", "prefetch"), "too long|no candidate stays"),
    Mutant(written_before_all_run_it, ("workers", "memory"), "all run it"),
    Mutant(experiment_without_a_breach, ("calm", "idle"), "why not|Why not"),
    Mutant(emergency_without_need, ("memory",), "not nearly exhausted"),
    Mutant(scales_against_another_manager, ("calm", "idle"), "another manager"),
    Mutant(
        disabled_rule_used,
        ("workers",),
        "a disabled rule",
        {"policy": replace(FIXED, disabled_rules=frozenset({"workers-up"}))},
    ),
    Mutant(excluded_knob_tuned, ("workers",), "excluded from tuning", _bounded("numWorkers", tune=False)),
    Mutant(direction_ignored, ("waste",), "may not go down", _bounded("prefetchSize", direction="UpOnly")),
    Mutant(forgotten_lower_bound, ("waste",), "prefetchSize", _bounded("prefetchSize", minimum=20)),
    Mutant(wasted_prefetches_doubled, ("waste",), "prefetch-down moves prefetchSize up"),
    Mutant(workers_taken_while_requests_wait, ("workers",), "workers-down cures nothing"),
    Mutant(
        memory_over_its_limit_is_no_fault,
        ("workers",),
        "memory is over its limit",
        {"gauge": {"waiting": 9.0, "memory_ratio": 0.9}},
    ),
    Mutant(
        promotion_without_the_controls, ("workers", "prefetch"), "controls cannot be trusted|promoted what"
    ),
    Mutant(hold_is_not_told, ("workers", "idle"), "nothing says why"),
    Mutant(hold_begins_again, ("workers", "idle"), "holds since then"),
)


def histories(mutant: Mutant, seeds: int = SEEDS) -> Iterator[World]:
    for seed in range(seeds):
        for regime in REGIMES:
            if regime.name in mutant.regimes:
                yield World(seed, replace(regime, **mutant.change), events=0.15)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[item.plant.__name__ for item in MUTANTS])
def test_mutant_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.plant(monkeypatch)
    # ``worlds`` calls the function it imported, which looks its steps up in the patched modules.
    assert worlds.decide is decide.decide
    with pytest.raises(AssertionError, match=mutant.says):
        for world in histories(mutant):
            for _ in world.ticks(TICKS):
                pass


def test_the_guards_of_knobs_are_those_that_rules_use() -> None:
    assert bounds.is_blocked is guards.is_blocked
    assert bounds.flap_budget_spent is guards.flap_budget_spent


@pytest.mark.parametrize(
    "mutant", [item for item in MUTANTS if item.change], ids=lambda item: item.plant.__name__
)
def test_without_the_mutant_the_same_worlds_are_safe(mutant: Mutant) -> None:
    for world in histories(mutant, seeds=5):
        assert len(list(world.ticks(TICKS))) == TICKS


def test_without_a_mutant_the_same_worlds_are_safe() -> None:
    for world in histories(Mutant(pause_ignored, ("workers", "idle"), "nothing"), seeds=5):
        assert len(list(world.ticks(TICKS))) == TICKS
