"""A change in flight goes on only while its mode permits it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.operator.tuning.experiments import canary, context, controls, in_phase, seen
from tests.operator.tuning.policies import CATALOGUE_BOUNDS

from kvpilot_operator.tuning.context import Draft
from kvpilot_operator.tuning.experiment.ends import TAKEN_BACK
from kvpilot_operator.tuning.observation import Promoted
from kvpilot_operator.tuning.permission.modes import revoke
from kvpilot_operator.tuning.policy import KnobBounds, Mode
from kvpilot_operator.tuning.state import Phase


@pytest.mark.parametrize(
    ("mode", "approved_by", "goes_on"),
    [
        ("Auto", "", True),
        ("Auto", "ada", True),
        ("Approve", "ada", True),
        ("Approve", "", False),
        ("Recommend", "ada", False),
        ("Off", "ada", False),
    ],
)
def test_an_experiment_goes_on_in_auto_or_with_an_approval(
    mode: Mode, approved_by: str, goes_on: bool
) -> None:
    state = in_phase(Phase.VERIFY, since=20.0, approved_by=approved_by)
    draft = revoke(context(seen(canary(), *controls()), mode=mode), Draft(state))
    assert (draft.state.phase is Phase.VERIFY) == goes_on
    if not goes_on:
        assert draft.state.phase is Phase.REVERT
        assert f"(ModeChanged: the mode is {mode})" in draft.records[0].summary


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ({"bounds": {**CATALOGUE_BOUNDS, "numWorkers": KnobBounds("numWorkers", 1, 3)}},
         "numWorkers 4 is out of its new bounds"),
        ({"bounds": {**CATALOGUE_BOUNDS, "numWorkers": KnobBounds("numWorkers", 1, 8, tune=False)}},
         "numWorkers is excluded from tuning now"),
        ({"disabled_rules": frozenset({"workers-up"})}, "workers-up is disabled now"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("phase", [Phase.VERIFY, Phase.PROMOTE])
def test_an_edit_that_excludes_what_is_tried_aborts_it(
    phase: Phase, policy: dict[str, Any], why: str
) -> None:
    draft = revoke(context(seen(canary(), *controls()), **policy), Draft(in_phase(phase, since=20.0)))
    assert draft.state.phase is Phase.REVERT
    assert f"(SpecChanged: {why})" in draft.records[0].summary


def test_harm_is_taken_back_to_a_value_outside_the_bounds() -> None:
    bounds = {**CATALOGUE_BOUNDS, "numWorkers": KnobBounds("numWorkers", 1, 3)}
    state = in_phase(Phase.PROMOTE, verdict=TAKEN_BACK)
    assert revoke(context(seen(canary(), *controls()), bounds=bounds), Draft(state)).state == state


def test_a_change_that_the_config_map_has_is_finished() -> None:
    state = in_phase(Phase.VERIFY, since=20.0)
    written = replace(seen(canary(), *controls()), promoted=Promoted(2, {}))
    assert revoke(context(written, mode="Off"), Draft(state)).state == state
