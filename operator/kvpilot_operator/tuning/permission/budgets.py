"""What tuning may cost within a day: restarts of replicas, and cache that its pushes drop."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from kvpilot_engine.contract import KnobClass
from kvpilot_engine.contract import knob as catalogued
from kvpilot_engine.contract.knobs import MIB
from kvpilot_engine.contract.wording import counted
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.assess.guards import DAY
from kvpilot_operator.tuning.context import Context, Draft, Proposal
from kvpilot_operator.tuning.state import MAX_SPENT, Spent, TuningState

GRAIN_S = 8 * 3600.0
"""What is spent within so many s is one entry, so that a day is a few of them."""


def charge(context: Context, draft: Draft) -> Draft:
    """Add what was spent since the last decision, and drop what is older than a day."""
    kept = tuple(item for item in draft.state.spent if item.at > context.now - DAY)
    draft = draft.with_state(spent=kept) if kept != draft.state.spent else draft
    restarts = sum(
        record.outcome == "Aborted" and record.evidence.get("verdict") == reasons.REPLICA_RESTARTED
        for record in draft.records
    )
    policy = context.policy
    if restarts and policy.restarts_per_day is not None:
        draft = _add(context, draft, "restarts", restarts)
    if context.observation.cache_lost_bytes and policy.cache_lost_per_day is not None:
        draft = _add(context, draft, "cacheLost", context.observation.cache_lost_bytes)
    return draft


def _add(context: Context, draft: Draft, what: Literal["restarts", "cacheLost"], amount: float) -> Draft:
    spent = draft.state.spent
    for index, item in enumerate(spent):
        if item.what == what and context.now - item.at < GRAIN_S:
            more = replace(item, amount=item.amount + amount)
            return draft.with_state(spent=(*spent[:index], more, *spent[index + 1 :]))
    return draft.with_state(spent=(*spent, Spent(what, context.now, amount))[-MAX_SPENT:])


def overspent(context: Context, state: TuningState, proposal: Proposal) -> tuple[str, str] | None:
    """Reason and message why an experiment would cost more than is left; None if it may begin.

    Relief of memory may drop cache at any time: an engine that is killed loses all of it.
    """
    policy = context.policy
    if policy.restarts_per_day is not None and _sum(state, "restarts") >= policy.restarts_per_day:
        message = f"replicas restarted during changes {counted(policy.restarts_per_day, 'time')} in a day"
        return reasons.RESTART_BUDGET, message
    shapes_cache = any(catalogued(item.knob).cls is KnobClass.CACHE for item in proposal.values)
    limit = policy.cache_lost_per_day
    if limit is None or not shapes_cache or proposal.objective == "memory":
        return None
    if _sum(state, "cacheLost") < limit:
        return None
    return reasons.CACHE_BUDGET, f"pushes dropped {limit / MIB:.0f} MiB of cache in a day"


def _sum(state: TuningState, what: Literal["restarts", "cacheLost"]) -> float:
    return sum(item.amount for item in state.spent if item.what == what)
