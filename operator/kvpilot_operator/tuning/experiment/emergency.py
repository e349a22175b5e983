"""The one change that is made everywhere at once: memory is nearly exhausted, so the batch is cut."""

from __future__ import annotations

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.bounds import room
from kvpilot_operator.tuning.canary import abort
from kvpilot_operator.tuning.look import MOST_TOLD, Draft, Look, told_changes
from kvpilot_operator.tuning.state import Change, KnobChange, Phase, Told

EMERGENCY_MEMORY = 0.95
"""Memory ratio at which the batch is cut at once."""

RULE = "memory-emergency"


def relieve(look: Look, draft: Draft) -> Draft:
    """Memory nearly exhausted: halve the batch everywhere, at once and without a canary.

    Once in ten cooldowns: what is left is for the rule that shrinks the cache.
    """
    state = draft.state
    if (
        look.untrusted is not None
        or draft.acted
        or look.memory < EMERGENCY_MEMORY
        or look.policy.mode != "Auto"
        or look.observation.paused_by
        or state.phase in {Phase.EMERGENCY, Phase.PROMOTE}
        or RULE in look.policy.disabled_rules
        or any(item.key == RULE for item in state.told)
    ):
        return draft
    batch = room(look, "batchSize")
    after = int(max(batch.now // 2, batch.minimum, 1)) if batch.tunable else batch.now
    if after >= batch.now:
        return draft
    return _begin_emergency(look, draft, (batch.to(after),))


def _begin_emergency(look: Look, draft: Draft, values: tuple[KnobChange, ...]) -> Draft:
    if draft.state.change is not None:
        draft = abort(look, draft, reasons.EMERGENCY, "memory is nearly exhausted")
    state = draft.state
    change = Change(
        id=draft.next_id,
        rule=RULE,
        values=values,
        epoch=state.epoch + 1,
        generation=state.last_generation + 1,
        started_at=look.now,
        phase_since=look.now,
        canary_uid="",
        control_uids=(),
        restarts=0,
        objective="memory",
        predicted_gain=0.0,
        verdict=reasons.EMERGENCY,
    )
    told = (*state.told, Told(RULE, look.now))[-MOST_TOLD:]
    summary = (
        f"Memory was at {look.memory:.0%} of its limit; {told_changes(values)} on all engines at once, "
        f"generation {change.generation}."
    )
    return draft.recorded(
        look,
        rule=change.rule,
        outcome="Promoted",
        summary=summary,
        changes=values,
        generation=change.generation,
        evidence={"verdict": reasons.EMERGENCY},
    ).with_state(
        phase=Phase.EMERGENCY,
        change=change,
        epoch=change.epoch,
        last_generation=change.generation,
        told=told,
    )
