"""Mode Approve: a proposal waits as a pending remedy until an override approves it.

What is approved is what was written down: a remedy whose figures moved meanwhile is carried out with those
that the approver saw, as long as its rule still proposes a change of the same knobs from the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvpilot_operator.tuning.configuration import within
from kvpilot_operator.tuning.context import (
    REPORT_COOLDOWNS,
    Context,
    Draft,
    Plan,
    Proposal,
    at_text,
    format_changes,
)
from kvpilot_operator.tuning.decision import Rejected
from kvpilot_operator.tuning.observation import Approval
from kvpilot_operator.tuning.permission.overrides import handle, refuse
from kvpilot_operator.tuning.price import price_of
from kvpilot_operator.tuning.state import Pending

APPROVAL_COOLDOWNS = REPORT_COOLDOWNS
"""A pending remedy expires after so many cooldowns; if it still stands it is proposed again."""


def await_approval(
    context: Context,
    draft: Draft,
    proposal: Proposal,
    rejected: tuple[Rejected, ...],
    act: Callable[[Context, Draft, Proposal], Draft],
) -> Draft:
    """Write a proposal down for approval; carry it out, exactly as Auto would, once it is approved."""
    held = next((item for item in draft.state.pending if item.of_replicas == _of_replicas(proposal)), None)
    if held is None:
        return _pend(context, draft, proposal, rejected)
    approval = _approval(context, draft, held)
    if (approval is None and not held.approved_by) or not _stands(context, held, proposal):
        return draft
    replicas = (context.observation.desired_replicas, held.replicas) if held.of_replicas else None
    approved = replace(
        proposal,
        values=held.values,
        predicted_gain=held.predicted_gain,
        ratio=held.ratio,
        message=held.why,
        replicas=replicas,
        prediction=proposal.prediction if replicas == proposal.replicas else None,
    )
    before = len(draft.records)
    draft = replace(act(context, draft.continuing(held.id), approved), deciding="")
    if approval is None or len(draft.records) == before:  # asked for already, or the fleet lets it wait
        return draft
    return _approved(handle(draft, approval.name), held, approval, before)


def review(context: Context, draft: Draft, plan: Plan) -> Draft:
    """Withdraw pending remedies that expired or no longer stand; refuse approvals of what is not pending."""
    for held in draft.state.pending:
        draft = _reviewed(context, draft, plan, held)
    known = {item.id for item in draft.state.pending}
    if (change := draft.state.change) is not None:
        known.add(change.id)
    for approval in context.observation.approvals:
        if approval.decision not in known:
            waiting = ", ".join(item.id for item in draft.state.pending) or "none"
            message = (
                f"{approval.decision} is not pending: it is unknown, was withdrawn or has expired; "
                f"pending now: {waiting}"
            )
            draft = refuse(context, draft, approval.name, approval.by, message)
    return draft


def _pend(context: Context, draft: Draft, proposal: Proposal, rejected: tuple[Rejected, ...]) -> Draft:
    expires = context.now + APPROVAL_COOLDOWNS * context.policy.pace.cooldown
    pending = Pending(
        id=draft.next_id,
        rule=proposal.rule,
        values=proposal.values,
        replicas=0 if proposal.replicas is None else proposal.replicas[1],
        objective=proposal.objective,
        predicted_gain=proposal.predicted_gain,
        why=proposal.message,
        since=context.now,
        expires=expires,
        ratio=proposal.ratio,
    )
    command = f"kvpilot approve {context.observation.name or 'NAME'} {pending.id}"
    return draft.recorded(
        context,
        rule=proposal.rule,
        outcome="Proposed",
        summary=f"{proposal.sentence}; {proposal.summary} {proposal.promise}. "
        f"Approve it with `{command}` before {at_text(expires)}.",
        changes=proposal.values,
        replicas=proposal.replicas,
        rejected=rejected,
        price=price_of(context, proposal),
        evidence={"why": proposal.message},
    ).with_state(pending=(*draft.state.pending, pending))


def _approved(draft: Draft, held: Pending, approval: Approval, before: int) -> Draft:
    """Say who approved it. A number of replicas stays approved until it is observed."""
    who = approval.by or f"override {approval.name}"
    records = tuple(
        replace(record, summary=f"{record.summary} Approved by {who}.")
        if index >= before and record.outcome != "Measured"
        else record
        for index, record in enumerate(draft.records)
    )
    change = draft.state.change
    if change is not None and change.id == held.id:
        change = replace(change, approved_by=who)
    kept = (replace(held, approved_by=who),) if held.of_replicas else ()
    others = (item for item in draft.state.pending if item.id != held.id)
    return replace(draft, records=records).with_state(change=change, pending=(*others, *kept))


def _reviewed(context: Context, draft: Draft, plan: Plan, held: Pending) -> Draft:
    proposal = plan.replicas if held.of_replicas else plan.canary
    if held.approved_by and context.observation.desired_replicas == held.replicas:
        return _without(draft, held)
    if (ended := _ended(context, draft, held)) is not None:
        return _withdraw(context, draft, held, ended)
    standing = proposal is not None and _stands(context, held, proposal)
    if standing or context.blocks or draft.state.change is not None:
        return _lapsing(draft, held, 0.0)
    if not held.lapsing_since:
        return _lapsing(draft, held, context.now)
    if context.now - held.lapsing_since < context.policy.pace.long:
        return draft
    other = f"{proposal.rule} is proposed now" if proposal is not None else "its cause is gone"
    return _withdraw(context, draft, held, other)


def _ended(context: Context, draft: Draft, held: Pending) -> str | None:
    """Why it waits no longer, whether its rule proposes it or not; None while it may."""
    if context.policy.mode != "Approve":
        return f"the mode is {context.policy.mode}"
    if context.now >= held.expires and _approval(context, draft, held) is None:
        return "nobody approved it in time"
    return None


def _withdraw(context: Context, draft: Draft, held: Pending, why: str) -> Draft:
    return _without(draft, held).recorded(
        context,
        id=held.id,
        rule=held.rule,
        outcome="Withdrawn",
        summary=f"{_summary(context, held)} no longer waits for an approval: {why}.",
        changes=held.values,
    )


def _lapsing(draft: Draft, held: Pending, since: float) -> Draft:
    """The draft in which a pending remedy does not stand since then; 0 for one that stands."""
    if held.lapsing_since == since:
        return draft
    pending = (
        replace(item, lapsing_since=since) if item.id == held.id else item for item in draft.state.pending
    )
    return draft.with_state(pending=tuple(pending))


def _without(draft: Draft, held: Pending) -> Draft:
    return draft.with_state(pending=tuple(item for item in draft.state.pending if item.id != held.id))


def _approval(context: Context, draft: Draft, held: Pending) -> Approval | None:
    """The override that approves it and has not been carried out yet."""
    return next(
        (
            item
            for item in context.observation.approvals
            if item.decision == held.id and item.name not in draft.state.handled
        ),
        None,
    )


def _stands(context: Context, held: Pending, proposal: Proposal) -> bool:
    """True if the rule still proposes this remedy: same knobs, same present values, same direction."""
    if held.rule != proposal.rule:
        return False
    if proposal.replicas is not None:
        scaling, asked = context.policy.scaling, proposal.replicas[0]
        inside = scaling is not None and scaling.minimum <= held.replicas <= scaling.maximum
        return inside and (held.replicas > asked) == (proposal.replicas[1] > asked)
    seen = [(item.knob, item.before) for item in held.values]
    return seen == [(item.knob, item.before) for item in proposal.values] and all(
        within(context.policy.bounds.get(item.knob), item.after) for item in held.values
    )


def _summary(context: Context, held: Pending) -> str:
    if held.of_replicas:
        return f"Replicas {context.observation.desired_replicas} -> {held.replicas}"
    return format_changes(held.values)


def _of_replicas(proposal: Proposal) -> bool:
    return proposal.replicas is not None
