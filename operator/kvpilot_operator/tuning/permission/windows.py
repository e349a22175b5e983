"""Recurring windows: whether one is open at a time, until when, and when the next one opens.

A window starts at each time of a cron schedule in its time zone and lasts a fixed number of elapsed seconds.
At the changes of daylight saving time starts follow Debian's cron: a start that falls into the skipped hour
comes right after it, and one in the repeated hour comes once.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from kvpilot_engine.contract.wording import counted
from kvpilot_operator.tuning.context import at_text
from kvpilot_operator.tuning.policy import Policy, Scaling, Window

FIELDS = 5
"""Minute, hour, day of the month, month, day of the week."""


def check_schedule(schedule: str) -> None:
    """Check a cron schedule.

    Raises:
        ValueError: it is none; the message says what is wrong.
    """
    if len(schedule.split()) != FIELDS:
        raise ValueError(
            "must be a cron schedule of 5 fields (minute hour day-of-month month day-of-week), "
            'such as "0 22 * * 1-5"'
        )
    try:
        CronSim(schedule, datetime.fromtimestamp(0, ZoneInfo("UTC")))
    except CronSimError as error:
        raise ValueError(f"must be a cron schedule: {str(error).lower()}") from None


def check_zone(zone: str) -> None:
    """Check the name of a time zone.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        ZoneInfo(zone)
    except (KeyError, OSError, ValueError):  # unknown, a folder, or outside of the database
        raise ValueError('must be a time zone of the IANA database, such as "Europe/Berlin"') from None


def open_until(window: Window, now: float) -> float | None:
    """When an open window closes, s since the epoch; None while it is closed."""
    start = _start(window.schedule, window.zone, int(now // 60), backwards=True)
    return None if start is None or start + window.duration <= now else start + window.duration


def opens_at(window: Window, now: float) -> float | None:
    """When it starts next, s since the epoch; None if it never does."""
    return _start(window.schedule, window.zone, int(now // 60), backwards=False)


@lru_cache(maxsize=1024)
def _start(schedule: str, zone: str, minute: int, *, backwards: bool) -> float | None:
    """The last start up to a minute (since the epoch), or the first one after it."""
    at = datetime.fromtimestamp((minute + backwards) * 60, ZoneInfo(zone))
    found = next(CronSim(schedule, at, reverse=backwards), None)
    return None if found is None else found.timestamp()


def closed(policy: Policy, now: float) -> str:
    """Why no experiment may begin: no maintenance window is open; "" if one is, or none is given."""
    windows = policy.maintenance
    if not windows or any(open_until(window, now) is not None for window in windows):
        return ""
    starts = [start for window in windows if (start := opens_at(window, now)) is not None]
    following = f"the next one opens at {at_text(min(starts))}" if starts else "none ever opens"
    return f"no maintenance window is open; {following}"


def in_force(policy: Policy, now: float) -> Policy:
    """The policy with the bounds of replicas of now: schedules raise them, the GPU budget caps them."""
    scaling = policy.scaling
    if scaling is None or (not scaling.schedules and scaling.gpu_limit is None):
        return policy
    opened = [item for item in scaling.schedules if open_until(item.window, now) is not None]
    low = max([scaling.minimum, *(item.minimum for item in opened)])
    given = [item.maximum for item in opened if item.maximum is not None]
    return replace(policy, scaling=_capped(scaling, low, max([low, *(given or [scaling.maximum])])))


def _capped(scaling: Scaling, low: int, high: int) -> Scaling:
    limit, why = scaling.gpu_limit, ""
    if limit is not None and limit < high:
        low, high, why = min(low, limit), limit, f"budgets.maxGPUs allows {counted(limit, 'replica')}"
    return replace(scaling, minimum=low, maximum=high, limited_by=why)
