"""What an action without arms should bring, remembered until ``tuning.results`` measures it."""

from __future__ import annotations

from kvpilot_operator.tuning.context import Context, Draft, Proposal
from kvpilot_operator.tuning.state import Expected


def expect(context: Context, draft: Draft, proposal: Proposal, decision: str) -> Draft:
    """Remember the prediction of a proposal that is carried out; it takes the place of one like it."""
    after = 0 if proposal.replicas is None else proposal.replicas[1]
    for item in draft.state.expected:
        if (item.replicas > 0) == (after > 0):
            draft = record_result(context, draft, item, "another one came before its effect showed")
    if (predicted := proposal.prediction) is None:
        return draft
    item = Expected(decision, proposal.rule, proposal.summary, predicted, context.now, after)
    return draft.with_state(expected=(*draft.state.expected, item))


def record_result(
    context: Context, draft: Draft, item: Expected, came: str, measured: float | None = None
) -> Draft:
    """Record what came of an action, or why that stays unknown (``measured`` is None); it is forgotten."""
    predicted = item.prediction
    error = None if measured is None else round(measured - predicted.value, 4)
    return draft.recorded(
        context,
        id=item.id,
        rule=item.rule,
        outcome="Measured",
        summary=f"{item.what}: {came}; {predicted.text} was predicted.",
        evidence={
            **predicted.evidence,
            "measured": None if measured is None else round(measured, 4),
            "predictionError": error,
        },
    ).with_state(expected=tuple(other for other in draft.state.expected if other != item))
