"""The mode of a resource, and whether its spec still permits a change in flight."""

from __future__ import annotations

from collections.abc import Callable

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.configuration import within
from kvpilot_operator.tuning.context import Context, Draft, Proposal, format_value
from kvpilot_operator.tuning.decision import Rejected
from kvpilot_operator.tuning.experiment.ends import TAKEN_BACK, TRIED, abort
from kvpilot_operator.tuning.permission.approval import await_approval
from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.price import price_of
from kvpilot_operator.tuning.state import Change, Phase

Act = Callable[[Context, Draft, Proposal], Draft]


def carry_out(
    context: Context,
    draft: Draft,
    proposal: Proposal,
    rejected: tuple[Rejected, ...],
    act: Act,
    *,
    urgent: bool = False,
) -> Draft:
    """Do in mode Auto what is proposed, ask for an approval in Approve, else recommend it.

    ``urgent``: what an override asked for, and relief of memory, need no approval.
    """
    mode = context.policy.mode
    if proposal.rule in context.observation.fleet.recommend_only and context.policy.acts and not urgent:
        message = f"{proposal.rule} did harm three times within an hour over all resources"
        return recommend(context, draft, proposal, rejected).held(context, reasons.RULE_BLOCKED, message)
    if mode == "Auto" or (mode == "Approve" and urgent):
        return act(context, draft, proposal)
    if mode == "Approve":
        return await_approval(context, draft, proposal, rejected, act)
    return recommend(context, draft, proposal, rejected)


def recommend(context: Context, draft: Draft, proposal: Proposal, rejected: tuple[Rejected, ...]) -> Draft:
    """Record a change that the user has to make, once per ten cooldowns."""
    return draft.report_once(
        context,
        f"{proposal.rule}:{proposal.summary}",
        rule=proposal.rule,
        outcome="Recommended",
        summary=f"{proposal.sentence}; {proposal.summary} {proposal.promise}, which kvpilot leaves to you.",
        changes=proposal.values,
        replicas=proposal.replicas,
        rejected=rejected,
        price=price_of(context, proposal),
        evidence={"why": proposal.message},
    )


def revoke(context: Context, draft: Draft) -> Draft:
    """Abort the change in flight if it is no longer permitted, unless the ConfigMap has it already."""
    change, promoted = draft.state.change, context.observation.promoted
    if change is None or promoted is None or promoted.generation == change.generation:
        return draft
    if draft.state.phase is Phase.REVERT or change.verdict == TAKEN_BACK:
        return draft
    if (why := _revoked(context, change, draft.state.phase)) is None:
        return draft
    return abort(context, draft, *why)


def _revoked(context: Context, change: Change, phase: Phase) -> tuple[str, str] | None:
    mode = context.policy.mode
    if off := context.observation.fleet.off:
        return reasons.KILL_SWITCH, off
    permitted = mode == "Auto" or (mode == "Approve" and change.approved_by)
    if phase in TRIED and not permitted:
        return reasons.MODE_CHANGED, f"the mode is {mode}"
    if phase is not Phase.EMERGENCY and (why := _excluded(context.policy, change)) is not None:
        return reasons.SPEC_CHANGED, why
    return None


def _excluded(policy: Policy, change: Change) -> str | None:
    """Why the spec no longer lets the tuner make a change that it began, or None."""
    if change.rule in policy.disabled_rules:
        return f"{change.rule} is disabled now"
    for item in change.values:
        bounds = policy.bounds.get(item.knob)
        if bounds is None or not bounds.tune:
            return f"{item.knob} is excluded from tuning now"
        if not within(bounds, item.after):
            return f"{item.knob} {format_value(item.after)} is out of its new bounds"
    return None
