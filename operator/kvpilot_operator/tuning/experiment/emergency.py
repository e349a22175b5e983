"""The one change that is made on all replicas at once, without a canary."""

from __future__ import annotations

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.context import Context, Draft, Proposal
from kvpilot_operator.tuning.experiment.ends import abort
from kvpilot_operator.tuning.experiment.evidence import MEMORY
from kvpilot_operator.tuning.experiment.expectation import expect
from kvpilot_operator.tuning.price import price_of
from kvpilot_operator.tuning.state import Measure, Phase


def begin_emergency(context: Context, draft: Draft, proposal: Proposal) -> Draft:
    """Push the proposal to all replicas; it aborts an experiment and is not repeated for ten cooldowns."""
    if draft.state.change is not None:
        draft = abort(context, draft, reasons.EMERGENCY, "memory is nearly exhausted")
    draft = draft.with_state(watch=None)  # what the cut does must not be blamed on the change before it
    change = draft.new_change(
        context,
        proposal,
        canary=None,
        controls=(),
        restarts=0,
        verdict=reasons.EMERGENCY,
        before=(Measure(MEMORY, context.memory, 1.0),),
    )
    draft = expect(context, draft, proposal, change.id)
    return (
        draft.recorded(
            context,
            rule=change.rule,
            outcome="Emergency",
            summary=f"{proposal.sentence}; {proposal.summary} on all replicas at once, "
            f"generation {change.generation}.",
            changes=change.values,
            generation=change.generation,
            price=price_of(context, proposal),
            evidence={"verdict": reasons.EMERGENCY, "why": proposal.message, **proposal.predicted},
        )
        .reporting(context, proposal.rule)
        .beginning(Phase.EMERGENCY, change)
    )
