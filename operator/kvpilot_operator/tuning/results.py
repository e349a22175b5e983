"""Results of actions that have no arms: what was predicted of them, against what was measured later.

An experiment measures its own effect. A change of the replicas and an emergency are made at once; their
records say what should come of them, and a second record of the same decision says what came.
"""

from __future__ import annotations

from dataclasses import replace

from kvpilot_operator.tuning.context import Context, Draft
from kvpilot_operator.tuning.experiment.expectation import record_result
from kvpilot_operator.tuning.experiment.verdict import deadline_of
from kvpilot_operator.tuning.sizing import use_of
from kvpilot_operator.tuning.state import IN_USE, Expected


def measure_results(context: Context, draft: Draft) -> Draft:
    """Record what came of every action whose effect shows by now, or can no longer show."""
    for item in draft.state.expected:
        draft = _measured(context, draft, item)
    return draft


def _measured(context: Context, draft: Draft, item: Expected) -> Draft:
    there = _in_force(context, draft, item)
    since = (item.since or context.now) if there else 0.0
    seconds = context.now - item.at
    if there and context.now - since >= _wait_s(context, item) and (found := _now(context, item)) is not None:
        in_use = item.measure == IN_USE
        was = f"the replicas were {found:.0%} in use" if in_use else f"memory was at {found:.0%}"
        return record_result(context, draft, item, f"{was} after {seconds:.0f} s", found)
    if context.now >= deadline_of(context, item.at + context.observation.start_s):
        return record_result(context, draft, item, f"its effect could not be measured within {seconds:.0f} s")
    if since == item.since:
        return draft
    kept = (replace(item, since=since) if other == item else other for other in draft.state.expected)
    return draft.with_state(expected=tuple(kept))


def _in_force(context: Context, draft: Draft, item: Expected) -> bool:
    """True if the replicas that were asked for serve, or every replica runs what was changed."""
    return len(context.everyone) == item.replicas if item.measure == IN_USE else draft.state.change is None


def _wait_s(context: Context, item: Expected) -> float:
    """Time from which on nothing from before the action is measured any more, s."""
    pace = context.policy.pace
    return pace.short + pace.scrape if item.measure == IN_USE else pace.settle


def _now(context: Context, item: Expected) -> float | None:
    """What is measured; None while that cannot be trusted."""
    if context.trust.nothing is not None:
        return None
    if item.measure == IN_USE:
        return use_of(context) if len(context.trust.counted) == len(context.everyone) else None
    return context.memory if context.current else None
