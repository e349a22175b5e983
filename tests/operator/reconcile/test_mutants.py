"""Planted mutants of the reconciler and of its recovery: the histories must notice every one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import pytest
from tests.operator.reconcile.deployment import Start, moments, prepared
from tests.operator.reconcile.machine import Managed, Moments, Restarts, play

from kvpilot_operator.ports import Conflict
from kvpilot_operator.reconcile import reconciler
from kvpilot_operator.reconcile.reconciler import Reconciler
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.status.model import Status
from kvpilot_operator.status.snapshot import Key, Replica, Snapshot
from kvpilot_operator.tuning import base_change, decide, replicas
from kvpilot_operator.tuning.context import Context, Draft
from kvpilot_operator.tuning.decision import Decision, Push, Record, TakeOverReplicas
from kvpilot_operator.tuning.experiment import canary
from kvpilot_operator.tuning.observation import Observation, Pin, Promoted
from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.state import PIN

ROUNDS, EXAMPLES, STEPS = 40, 4, 20
"""Histories that a mutant may survive at most, and their length. Most are found in the first."""

Patch = pytest.MonkeyPatch


# The order of writes


def acts_before_the_status_is_written(patch: Patch) -> None:
    write, act = Reconciler._write_status, Reconciler._act

    async def hasty(
        self: Reconciler, snapshot: Snapshot, policy: Policy, seen: Observation, decision: Decision
    ) -> Snapshot:
        await act(self, snapshot, seen, decision)
        return await write(self, snapshot, policy, seen, decision)

    async def nothing(*given: Any) -> None:
        """It is done."""

    patch.setattr(Reconciler, "_write_status", hasty)
    patch.setattr(Reconciler, "_act", nothing)


def a_conflict_is_swallowed(patch: Patch) -> None:
    plain = Reconciler._write

    async def stubborn(
        self: Reconciler, snapshot: Snapshot, after: Status, records: Sequence[Record] = ()
    ) -> Snapshot:
        try:
            return await plain(self, snapshot, after, records)
        except Conflict:
            return snapshot

    patch.setattr(Reconciler, "_write", stubborn)


def a_record_is_published_before_its_status(patch: Patch) -> None:
    write, record = Reconciler._write_status, Reconciler._record

    async def talkative(
        self: Reconciler, snapshot: Snapshot, policy: Policy, seen: Observation, decision: Decision
    ) -> Snapshot:
        await record(self, snapshot, decision)
        return await write(self, snapshot, policy, seen, decision)

    async def nothing(*given: Any) -> None:
        """It is done."""

    patch.setattr(Reconciler, "_write_status", talkative)
    patch.setattr(Reconciler, "_record", nothing)


def an_action_is_taken_only_once(patch: Patch) -> None:
    """What a decision repeats with an unchanged status is taken for done."""
    write, act = Reconciler._write, Reconciler._act

    async def noticing(self: Reconciler, snapshot: Snapshot, *given: Any) -> Snapshot:
        written = await write(self, snapshot, *given)
        self._news = written is not snapshot
        return written

    async def once(self: Reconciler, *given: Any) -> None:
        if self._news:
            await act(self, *given)

    patch.setattr(Reconciler, "_write", noticing)
    patch.setattr(Reconciler, "_act", once)


def a_roll_out_that_failed_is_not_repeated(patch: Patch) -> None:
    patch.setattr(Reconciler, "forget", lambda self, key: None)


# Recovery


def a_successor_forgets_the_change_in_flight(patch: Patch) -> None:
    """The first reconcile of a process does not read the change of the status."""
    plain, read = Reconciler._reconcile, reconciler.state_of

    async def forgetful(self: Reconciler, key: Key) -> Any:
        known, self._known = getattr(self, "_known", False), True
        with pytest.MonkeyPatch.context() as once:
            if not known:
                once.setattr(reconciler, "state_of", lambda status: replace(read(status), change=None))
            return await plain(self, key)

    patch.setattr(Reconciler, "_reconcile", forgetful)


def a_stray_candidate_is_left(patch: Patch) -> None:
    """What runs a newer generation than the promoted one is not pushed back unless a change says so."""
    plain = decide.converge

    def trusting(context: Context, draft: Draft) -> Draft:
        draft, promoted = plain(context, draft), context.observation.promoted
        if draft.state.change is not None or promoted is None:
            return draft
        newer = {
            replica.uid
            for replica in context.everyone
            if replica.engine is not None and replica.engine.generation > promoted.generation
        }
        kept = (action for action in draft.actions if not (isinstance(action, Push) and action.uid in newer))
        return replace(draft, actions=tuple(kept))

    patch.setattr(decide, "converge", trusting)


def a_lost_status_resets_what_is_tuned(patch: Patch) -> None:
    patch.setattr(base_change, "overlay_between", lambda base, config: ())


def a_lost_status_hides_an_edit(patch: Patch) -> None:
    patch.setattr(Reconciler, "_recorded_base", lambda self, snapshot: None)


def a_lost_config_map_restarts_the_generations(patch: Patch) -> None:
    async def first(self: Reconciler, snapshot: Snapshot, base: Mapping[str, Any]) -> Promoted:
        return Promoted(1, base)

    patch.setattr(Reconciler, "_config_before", first)


def a_lost_status_restarts_the_epochs(patch: Patch) -> None:
    plain = base_change.remember

    def forgetful(context: Context, draft: Draft) -> Draft:
        return plain(context, draft).with_state(epoch=draft.state.epoch)

    patch.setattr(decide, "remember", forgetful)


def a_lost_status_restarts_the_generations(patch: Patch) -> None:
    """Neither engines nor records nor epochs tell how far the generations were."""
    plain = base_change.remember

    def forgetful(context: Context, draft: Draft) -> Draft:
        promoted = context.observation.promoted
        found = plain(context, draft)
        if promoted is None or draft.state.last_generation:
            return found
        return found.with_state(last_generation=promoted.generation)

    patch.setattr(decide, "remember", forgetful)


def a_lost_status_restarts_the_decisions(patch: Patch) -> None:
    plain = reconciler.last_numbers

    def forgetful(records: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
        return 0, plain(records)[1]

    patch.setattr(reconciler, "last_numbers", forgetful)


# What stops a candidate


def the_kill_switch_leaves_a_candidate(patch: Patch) -> None:
    plain = decide.revoke

    def deaf(context: Context, draft: Draft) -> Draft:
        seen = replace(context.observation, fleet=replace(context.observation.fleet, off=""))
        return plain(replace(context, observation=seen), draft)

    patch.setattr(decide, "revoke", deaf)


def an_invalid_edit_strands_the_candidate(patch: Patch) -> None:
    plain = canary._interruption

    def deaf(context: Context, *given: Any) -> tuple[str, str] | None:
        seen = replace(context.observation, spec_error="")
        return plain(replace(context, observation=seen), *given)

    patch.setattr(canary, "_interruption", deaf)


class RefusedError(Exception):
    """A spec that is invalid."""

    def __init__(self, snapshot: Snapshot, error: ManifestError) -> None:
        super().__init__(str(error))
        self.snapshot, self.error = snapshot, error


def an_invalid_edit_ends_the_reconcile(patch: Patch) -> None:
    """It is refused as the first spec of a resource is, though there is one to go on from."""
    plain, resolve = Reconciler._reconcile, Reconciler._resolve

    def strict(self: Reconciler, snapshot: Snapshot) -> Any:
        try:
            return resolve(self, snapshot)
        except ManifestError as error:
            raise RefusedError(snapshot, error) from error

    async def short(self: Reconciler, key: Key) -> Any:
        try:
            return await plain(self, key)
        except RefusedError as refused:
            await self._refuse(refused.snapshot, refused.error)
            return None

    patch.setattr(Reconciler, "_resolve", strict)
    patch.setattr(Reconciler, "_reconcile", short)


def a_pause_is_not_seen(patch: Patch) -> None:
    _gathered(patch, lambda self, snapshot, seen: replace(seen, paused_by=""))


def an_edit_is_unseen_in_mid_change(patch: Patch) -> None:
    plain = decide.adopt_edit

    def busy(context: Context, draft: Draft) -> Draft:
        return draft if draft.state.change is not None else plain(context, draft)

    patch.setattr(decide, "adopt_edit", busy)


# What is old


def a_stale_number_of_replicas_is_applied(patch: Patch) -> None:
    """The number that is asked for is the one of the reconcile before."""

    def stale(self: Reconciler, snapshot: Snapshot, seen: Observation) -> Observation:
        last = getattr(self, "_asked", seen.desired_replicas)
        self._asked = seen.desired_replicas
        return replace(seen, desired_replicas=last)

    _gathered(patch, stale)


def a_push_has_an_old_epoch(patch: Patch) -> None:
    plain = Reconciler._push

    async def late(self: Reconciler, replica: Replica, push: Push) -> float:
        return await plain(self, replica, replace(push, epoch=push.epoch - 1))

    patch.setattr(Reconciler, "_push", late)


def the_replicas_are_taken_over_at_once(patch: Patch) -> None:
    def hasty(context: Context, draft: Draft) -> Draft:
        seen = context.observation
        managed = seen.replicas_managed_by and not seen.autoscaler
        return draft.acting(TakeOverReplicas(seen.desired_replicas)) if managed else draft

    patch.setattr(replicas, "_take_over", hasty)


def an_expired_pin_stays(patch: Patch) -> None:
    plain = decide.keep_pins

    def loyal(context: Context, draft: Draft) -> Draft:
        seen = context.observation
        known = {pin.knob for pin in seen.pins}
        old = tuple(
            Pin(entry.decision.removeprefix(PIN), entry.knob, entry.value, context.now + 1)
            for entry in draft.state.overlay
            if entry.pinned and entry.knob not in known
        )
        return plain(replace(context, observation=replace(seen, pins=(*seen.pins, *old))), draft)

    patch.setattr(decide, "keep_pins", loyal)


def _gathered(patch: Patch, change: Callable[[Reconciler, Snapshot, Observation], Observation]) -> None:
    """Let the reconciler observe something else than there is."""
    plain = Reconciler._gather

    async def gather(self: Reconciler, snapshot: Snapshot, *given: Any) -> Observation:
        return change(self, snapshot, await plain(self, snapshot, *given))

    patch.setattr(Reconciler, "_gather", gather)


@dataclass(frozen=True)
class Mutant:
    """A mutant, what is said when it is found, and the histories that it is looked for in."""

    plant: Callable[[Patch], None]
    says: str
    scene: str = "few workers, scaled"
    paths: tuple[str, ...] = ()
    machine: type[Managed] | None = None


TRIED = ("prefetch", ("prefetch-up:Tried",))
"""While a candidate is tried that takes long."""

TUNED = ("few workers, scaled", ("rollback:RolledBack",))
"""After a promotion."""

MUTANTS = (
    Mutant(acts_before_the_status_is_written, "announced is|announces it|without a decision"),
    Mutant(a_conflict_is_swallowed, "follows a status that was not written"),
    Mutant(a_record_is_published_before_its_status, "is recorded before it is written"),
    Mutant(
        an_action_is_taken_only_once, "runs generation|not settled|pinned at|not in the", machine=Restarts
    ),
    Mutant(a_roll_out_that_failed_is_not_repeated, "the objects of spec generation", machine=Restarts),
    Mutant(a_successor_forgets_the_change_in_flight, "is no longer in flight, and nothing tells why", *TRIED),
    Mutant(a_stray_candidate_is_left, "runs generation", *TRIED),
    Mutant(a_lost_status_resets_what_is_tuned, "is forgotten with the status", *TUNED),
    Mutant(a_lost_status_hides_an_edit, "is taken for a tuned value", *TUNED),
    Mutant(a_lost_config_map_restarts_the_generations, "names two configurations", *TUNED),
    Mutant(
        a_lost_status_restarts_the_epochs, "no engine refuses it|fences off|the epoch begins again", *TRIED
    ),
    Mutant(a_lost_status_restarts_the_generations, "the generation begins again", *TRIED),
    Mutant(a_lost_status_restarts_the_decisions, "the decision begins again", *TRIED),
    Mutant(the_kill_switch_leaves_a_candidate, "although the kill switch is on", *TRIED),
    Mutant(an_invalid_edit_strands_the_candidate, "no candidate stays|although the spec is invalid", *TRIED),
    Mutant(an_invalid_edit_ends_the_reconcile, "nothing is decided, though a spec is accepted", *TRIED),
    Mutant(a_pause_is_not_seen, "although tuning is paused", *TRIED),
    Mutant(an_edit_is_unseen_in_mid_change, "is not in the ConfigMap", *TRIED),
    Mutant(a_stale_number_of_replicas_is_applied, "is not what is asked for now", *TUNED),
    Mutant(a_push_has_an_old_epoch, "announced is"),
    Mutant(the_replicas_are_taken_over_at_once, "are taken over after", *TUNED),
    Mutant(an_expired_pin_stays, "a pin that has ended still holds", TUNED[0], ("pin:Unpinned",)),
)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutant", MUTANTS, ids=[item.plant.__name__ for item in MUTANTS])
def test_mutant_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    moments(mutant.scene)  # without the mutant, and for all of them
    for start in get_args(Start):
        prepared(mutant.scene, start)
    mutant.plant(monkeypatch)
    machine = mutant.machine or partial(Moments, paths=mutant.paths)
    others: list[str] = []
    for number in range(ROUNDS):
        try:
            play(machine, mutant.scene, number, examples=EXAMPLES, steps=STEPS)
        except AssertionError as error:
            if re.search(mutant.says, str(error)):
                return
            others.append(str(error))
    pytest.fail(f"it was not found; what else was said: {others}")
