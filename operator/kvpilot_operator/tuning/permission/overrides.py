"""Overrides that are carried out once: each is answered once, and remembered while it is in force."""

from __future__ import annotations

from kvpilot_operator.tuning.context import Context, Draft
from kvpilot_operator.tuning.observation import Observation
from kvpilot_operator.tuning.state import MAX_HANDLED


def handle(draft: Draft, name: str) -> Draft:
    """The draft that remembers that an override was carried out or refused."""
    return draft.with_state(handled=(*draft.state.handled, name))


def answerable(draft: Draft, name: str) -> bool:
    """True if an override was not answered yet, and its answer can be remembered.

    One that could not be remembered would be carried out again and again: it waits for another to expire.
    """
    return name not in draft.state.handled and len(draft.state.handled) < MAX_HANDLED


def refuse(context: Context, draft: Draft, name: str, by: str, message: str) -> Draft:
    """Report once that an override cannot be carried out, and why."""
    if not answerable(draft, name):
        return draft
    who = f" by {by}" if by else ""
    draft = draft.recorded(
        context, rule="override", outcome="Refused", summary=f"Override {name}{who} has no effect: {message}."
    )
    return handle(draft, name)


def forget_ended(context: Context, draft: Draft) -> Draft:
    """Forget answers to overrides that are no longer in force."""
    names = _in_force(context.observation)
    kept = tuple(name for name in draft.state.handled if name in names)
    return draft if kept == draft.state.handled else draft.with_state(handled=kept)


def _in_force(observation: Observation) -> frozenset[str]:
    rollback = observation.rollback
    return frozenset(
        {item.name for item in observation.approvals}
        | {item.name for item in observation.pins}
        | ({rollback.name} if rollback is not None else set())
    )
