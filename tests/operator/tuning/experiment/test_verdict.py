"""What is said of an experiment: the sentence about its effect, and what is met without it."""

from __future__ import annotations

from typing import Any

import pytest
from tests.operator.tuning.experiments import CURED, change, context, verified
from tests.operator.tuning.observations import BAD, GOOD
from tests.operator.tuning.policies import PRODUCTION

from kvpilot_operator.tuning.experiment.verdict import arms, format_effect, met_by, overdue

VERIFY_S = 45.0


def effect(canary: dict[str, Any], control: dict[str, Any], **fields: Any) -> str:
    tried = change(since=VERIFY_S, **{"measure": "capacity", **fields})
    one, other = arms(context(verified(canary, control)), tried)
    return format_effect(tried, one, other, PRODUCTION)


@pytest.mark.parametrize(
    ("canary", "control", "fields", "sentence"),
    [
        (
            {"attained": CURED},
            {"attained": BAD},
            {},
            "p95 within 500 ms rose from 41% to 99%, mean time stayed at 0.08 s",
        ),
        (
            {"hit": 0.6},
            {"hit": 0.4},
            {"measure": "hitRate", "objective": "hitRate"},
            "the hit rate rose from 40% to 60%",
        ),
        (
            {"prefetched": (1.0, 1.0)},
            {"prefetched": (1.0, 4.0)},
            {"measure": "prefetchWaste", "objective": "prefetchWaste"},
            "wasted blocks per request fell from 4.00 to 1.00",
        ),
    ],
)
def test_sentence_tells_controls_first(
    canary: dict[str, Any], control: dict[str, Any], fields: dict[str, Any], sentence: str
) -> None:
    assert effect(canary, control, **fields) == sentence


def test_nothing_is_left_to_gain_where_the_controls_meet_the_objective() -> None:
    seen = context(verified({"attained": GOOD}, {"attained": GOOD}))
    _, control = arms(seen, change(since=VERIFY_S))
    assert met_by(control, "p95", PRODUCTION)
    _, breached = arms(context(verified({"attained": GOOD}, {"attained": BAD})), change(since=VERIFY_S))
    assert not met_by(breached, "p95", PRODUCTION)


def test_objective_for_errors_counts_what_was_shed() -> None:
    shedding = context(verified({}, {"attained": GOOD, "shed": 0.03}))
    _, control = arms(shedding, change(since=VERIFY_S))
    assert not met_by(control, "errors", PRODUCTION), "1% may fail"


@pytest.mark.parametrize(("since", "late"), [(4 * VERIFY_S - 1, False), (4 * VERIFY_S, True)])
def test_experiment_is_overdue_after_four_verify_times(since: float, late: bool) -> None:
    assert overdue(context(verified({}, {})), change(since=since)) is late
