"""The windows that a decision needs measured, beside the short and the long one."""

from __future__ import annotations

from kvpilot_operator.tuning.pace import MIN_SCRAPES, Pace
from kvpilot_operator.tuning.state import TuningState


def windows_of(state: TuningState, pace: Pace, now: float) -> dict[str, float]:
    """Lengths of the windows to measure, s, by name.

    ``verify`` reaches back to when the candidate began to show, ``watch`` to when it ran everywhere. A window
    too short for the source is left out, and what needs it waits.
    """
    found = {"short": pace.short, "long": pace.long}
    change, watch = state.change, state.watch
    least = MIN_SCRAPES * pace.scrape
    if change is not None and change.measured_from and now - change.measured_from >= least:
        found["verify"] = now - change.measured_from
    if watch is not None and now - watch.since >= least:
        found["watch"] = now - watch.since
    return found
