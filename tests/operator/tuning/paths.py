"""The paths that a decision takes, for the gates that count them."""

from __future__ import annotations

from collections.abc import Iterator

from tests.operator.tuning.invariants import TRYING, Step

from kvpilot_operator.tuning.assess.trust import trust
from kvpilot_operator.tuning.decision import Push, TakeOverReplicas


def paths(step: Step) -> Iterator[str]:
    """Outcomes, rules with outcomes, and what else was done or held up."""
    for record in step.decision.records:
        yield record.outcome
        yield f"{record.rule}:{record.outcome}"
        if record.outcome == "Reverted" and step.before.change is None:
            yield "taken back"
    if step.decision.state.holds:
        yield "hold"
    yield from (hold.reason for hold in step.decision.state.holds)
    if trust(step.observation, step.policy).too_few is not None:
        yield "untrusted"
    change, phase = step.decision.state.change, step.decision.state.phase
    if change is not None and change.widened and phase in TRYING:
        yield "widened"
    for action in step.decision.actions:
        if isinstance(action, TakeOverReplicas):
            yield "takeover"
        if isinstance(action, Push) and change is not None:
            yield "pushed to a canary" if phase in TRYING else "pushed to all"
