"""The number of replicas. Up at once when it is proven that no knob helps; down slowly, one pod at a time.

Pods that are asked for count as capacity before they are ready, and a young pod stops every further
judgement, so a slow start never cascades.
"""

from __future__ import annotations

import math
from dataclasses import replace

from kvpilot_engine.contract.metrics import Stage
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.canary import TRIED, abort
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.decision import Scale
from kvpilot_operator.tuning.diagnosis import busy_share, occupancy
from kvpilot_operator.tuning.look import MOST_TOLD, Draft, Look, Plan
from kvpilot_operator.tuning.objectives import rates
from kvpilot_operator.tuning.policy import Scaling
from kvpilot_operator.tuning.state import ReplicaMark, Told

UTILISATION = 0.8
"""Capacity is sized so that engines are in use for this share."""

GROWTH_MARGIN = 1.15
"""Before a scale-in the need is recomputed at this multiple of the load."""

BOUNDS = "replicas-bounds"
"""The rule that keeps replicas within the user's bounds: a wish to be met in every mode, and no tuning."""

OVERFLOW = 1.05
"""Arrivals exceed completions by this factor in both windows: the queue grows or requests are shed."""

MOST_MARKS, GAP_PARTS = 10, 4
"""Marks of one look-back, and the part of it after which a gap between two marks starts it again."""

REPEAT_PARTS = 8
"""While fewer replicas are needed, this is marked so many times in one look-back."""


def size(look: Look, draft: Draft, plan: Plan) -> Draft:  # noqa: PLR0911 - one return per reason
    """Choose the number of replicas, where it is ours to choose."""
    scaling, observation = look.policy.scaling, look.observation
    if scaling is None:
        return _without_marks(draft)
    if observation.replicas_managed_by:
        who = observation.replicas_managed_by
        return _without_marks(draft).held(
            look, reasons.ACTUATOR_CONFLICT, f"{who} writes the replicas as well; kvpilot does not scale"
        )
    if observation.paused_by:
        return draft
    if observation.replicas > scaling.maximum:
        return _scaled(look, draft, scaling.maximum, BOUNDS, f"the maximum is {scaling.maximum}")
    if observation.replicas < scaling.minimum:
        return _out(look, draft, scaling.minimum, BOUNDS, f"the minimum is {scaling.minimum}")
    if look.policy.mode == "Off":
        return _without_marks(draft)
    draft = _remember_boost(look, draft, scaling)
    floor = _floor(look, scaling)
    if observation.replicas < floor:
        names = ", ".join(sorted(b.name for b in observation.boosts if b.min_replicas > scaling.minimum))
        return _out(look, draft, floor, "boost", f"override {names} asks for at least {floor}")
    if look.untrusted is not None or look.stalled or observation.rolling_out:
        return _without_marks(draft)
    up = _wanted_up(look, draft, plan, scaling) if scaling.direction != "InOnly" else None
    if up is not None:
        return _out(look, draft, *up)
    return draft if scaling.direction == "OutOnly" else _down(look, draft, scaling, floor)


def needed_replicas(look: Look) -> int:
    """Replicas that 1.15 times the load of the long window needs; the look-back remembers the peaks.

    Load per engine is the larger one of stepping time over wall time, and held worker slots over slots.
    """
    if look.traffic == "NoTraffic":
        return 0
    workers: int = value(look.config, "numWorkers")

    load = max(busy_share(look.long), occupancy(look.long) / workers)
    return math.ceil(len(look.ready) * load * GROWTH_MARGIN / UTILISATION - 1e-9)


def _floor(look: Look, scaling: Scaling) -> int:
    boosts = [b.min_replicas for b in look.observation.boosts if b.expires_at > look.now]
    return min(scaling.maximum, max([scaling.minimum, *boosts]))


def _remember_boost(look: Look, draft: Draft, scaling: Scaling) -> Draft:
    floor = _floor(look, scaling)
    if floor > max(scaling.minimum, draft.state.boosted):
        return draft.with_state(boosted=floor)
    return draft


def why_not_more(look: Look) -> str:
    """Why a breach that only capacity cures gets none; "" where that is not the reason."""
    scaling = look.policy.scaling
    if scaling is None:
        return "replicas are chosen by somebody else"
    if look.observation.replicas >= scaling.maximum:
        return f"replicas-up: {reasons.AT_BOUND}, the maximum is {scaling.maximum}"
    if scaling.direction == "InOnly":
        return "replicas-up: the direction is InOnly"
    if len(look.ready) < look.observation.replicas:
        return "replicas-up: pods that were asked for are not ready yet"
    return ""


def _wanted_up(look: Look, draft: Draft, plan: Plan, scaling: Scaling) -> tuple[int, str, str] | None:
    """Target, rule and clause of a scale-out, or None."""
    if "replicas-up" in look.policy.disabled_rules or not look.serving_badly or look.draining:
        return None
    ready, asked = len(look.ready), look.observation.replicas
    ratio = _overflow(look)
    if look.diagnosis.saturated:
        busy = busy_share(look.short)
        why = f"the device is saturated ({busy:.0%} of the time in steps, more rows gain little)"
    elif _out_of_knobs(look, draft, plan) and (ratio > OVERFLOW or _waits(look)):
        why = f"arrivals are {ratio:.2f} times completions and no knob promises relief"
        if ratio <= OVERFLOW:
            why = f"{look.diagnosis.message}, and no knob promises relief"
    else:
        return None
    # Sized by what is ready and compared with what is asked for: pending pods are credited.
    target = min(math.ceil(ready * ratio / UTILISATION - 1e-9), max(2 * ready, ready + 4), scaling.maximum)
    return (target, "replicas-up", why) if target > asked else None


def _out_of_knobs(look: Look, draft: Draft, plan: Plan) -> bool:
    """True when no hot knob promises relief, or none may be tried on the one replica there is."""
    if draft.state.change is not None or look.now < draft.state.cooldown_until:
        return False
    alone = len(look.ready) == 1 and look.policy.single_replica == "Recommend"
    return plan.proposal is None or (alone and _overflow(look) > OVERFLOW)


def _overflow(look: Look) -> float:
    """Arrivals over completions, the smaller one of both windows; 1 at least."""
    ratios = []
    for window in ("short", "long"):
        arrivals, completed = rates(look.observation, window)
        ratios.append(arrivals / completed if completed else 1.0 if not arrivals else 2.0)
    return max(1.0, min(ratios))


def _waits(look: Look) -> bool:
    return look.diagnosis.stage in {Stage.ADMISSION_WAIT, Stage.BATCH_WAIT, Stage.PREEMPTED}


def _down(look: Look, draft: Draft, scaling: Scaling, floor: int) -> Draft:
    """One pod less when fewer were needed for the whole look-back, or what a boost added is left over."""
    asked = look.observation.replicas
    needed = min(scaling.maximum, max(floor, needed_replicas(look)))
    if "replicas-down" in look.policy.disabled_rules or needed >= asked or look.serving_badly:
        boosted = draft.state.boosted if floor > scaling.minimum or look.serving_badly else 0
        return _without_marks(draft).with_state(boosted=boosted)
    pending = len(look.ready) != asked or len(look.observation.pods) != asked
    if draft.state.change is not None or pending:
        return _without_marks(draft)
    draft = _marked(look, draft, needed)
    marks, idle = draft.state.scale_down, look.policy.pace.idle
    if look.now < draft.state.cooldown_until:
        return draft
    if floor == scaling.minimum and scaling.minimum < asked <= draft.state.boosted:
        why = f"the boost has expired, and {needed} would do for 1.15 times the load"
        return _scaled(look, draft, asked - 1, "boost-decay", why)
    most = max(mark.replicas for mark in marks)
    if look.now - marks[0].at < idle or most >= asked:
        return draft
    why = f"{most} would have done for 1.15 times the load during the last {idle:g} s"
    return _scaled(look, draft, asked - 1, "replicas-down", why)


def _marked(look: Look, draft: Draft, needed: int) -> Draft:
    """Remember the need, seldom enough that the status is not rewritten at every look.

    A gap in the marks starts the look-back again: what nobody saw was not idle. The newest mark that is older
    than the look-back stays, as it proves the beginning.
    """
    marks, idle = draft.state.scale_down, look.policy.pace.idle
    while len(marks) > 1 and marks[1].at <= look.now - idle:
        marks = marks[1:]
    if not marks or look.now - marks[-1].at > max(idle / GAP_PARTS, 2 * look.policy.pace.tick):
        return draft.with_state(scale_down=(ReplicaMark(look.now, needed),))
    last = marks[-1]
    if needed > last.replicas:
        marks = (*marks[:-1], replace(last, replicas=needed))
    elif look.now - last.at >= idle / REPEAT_PARTS:
        marks = (*marks, ReplicaMark(look.now, needed))
    return draft.with_state(scale_down=marks[-MOST_MARKS:])


def _without_marks(draft: Draft) -> Draft:
    return draft.with_state(scale_down=()) if draft.state.scale_down else draft


def _out(look: Look, draft: Draft, target: int, rule: str, why: str) -> Draft:
    """More capacity; a change that is being tried gives way, without being judged."""
    draft = _without_marks(draft)
    if look.policy.mode == "Auto" and draft.state.phase in TRIED:
        draft = abort(look, draft, reasons.SCALING_OUT, "capacity is added first")
    return _scaled(look, draft, target, rule, why)


def _scaled(look: Look, draft: Draft, target: int, rule: str, why: str) -> Draft:
    asked = look.observation.replicas
    text = f"{why[:1].upper()}{why[1:]}; replicas {asked} -> {target}"
    fields = {"rule": rule, "replicas": (asked, target)}
    if look.policy.mode != "Auto" and rule != BOUNDS:
        key = f"{rule}:{asked}->{target}"
        return draft.told_once(look, key, outcome="Recommended", summary=f"{text} is recommended.", **fields)
    draft = draft.acting(Scale(target, rule))
    key = f"scale:{asked}->{target}"
    if any(item.key == key and look.now - item.at < look.policy.pace.settle for item in draft.state.told):
        return draft  # asked for a moment ago, and not seen yet
    outcome = "ScaledOut" if target > asked else "ScaledIn"
    told = (*(item for item in draft.state.told if item.key != key), Told(key, look.now))[-MOST_TOLD:]
    draft = draft.recorded(look, outcome=outcome, summary=f"{text}.", **fields)
    return draft.with_state(told=told, cooldown_until=look.now + look.policy.pace.cooldown)
