"""Random histories of a deployment under the real reconciler: safe at every step, and at rest in the end."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest
from tests.operator.reconcile.deployment import SCENES
from tests.operator.reconcile.faulty_ports import WRITES, Moment
from tests.operator.reconcile.machine import Histories, Managed, Restarts, play, taken

OFTEN = 50
"""How often each path is taken at least that a run is there for."""

HAPPENED = (
    *("clock jump", "lost status", "edit", "invalid edit", "refused edit", "mode", "kill switch"),
    *("pause", "pin", "boost", "rollback", "engine restarts", "pod is deleted"),
    *("fault of one replica", "fault of all"),
)
"""What the histories are there for. The rules of the tuner are counted in ``tuning/test_properties``."""

SEEN = ("Promoted", "Reverted", "Aborted", "Emergency", "ScaledOut", "ScaledIn", "RolledBack", "taken back")
"""What the tuner does meanwhile, now and then: each a few times, or the histories interrupt nothing."""


MAX_ROUNDS = 4
"""Rounds of histories in which every path must have been taken often enough."""


def play_until_taken(
    required: dict[str, int], machine: type[Managed], *scenes: str, examples: int, steps: int
) -> None:
    """Play rounds of histories until every path was taken as often as required.

    One round is enough as a rule. How often it takes a rare path is chance: Hypothesis also draws constants
    of the modules that the process has imported, which depend on the tests that ran before.
    """
    taken.clear()
    for number, scene in enumerate(scenes * MAX_ROUNDS):
        play(machine, scene, number, examples=examples, steps=steps)
        if number % len(scenes) == len(scenes) - 1 and not rare(required):
            return
    pytest.fail(f"taken too seldom to prove anything: {rare(required)} of {dict(sorted(taken.items()))}")


def rare(required: dict[str, int]) -> dict[str, int]:
    """How often the paths were taken that were not taken often enough."""
    return {path: taken[path] for path, number in required.items() if taken[path] < number}


@pytest.mark.parametrize("machine", [Histories, Restarts])
def test_a_few_histories(machine: type[Managed]) -> None:
    for number, scene in enumerate(("few workers, scaled", "scaled in")):
        play(machine, scene, number, examples=3, steps=20)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_that_happens_makes_the_operator_unsafe() -> None:
    required = dict.fromkeys(HAPPENED, OFTEN) | dict.fromkeys(SEEN, 5)
    play_until_taken(required, Histories, *(scene.name for scene in SCENES), examples=9, steps=40)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_operator_may_die_before_and_after_every_write() -> None:
    required = {f"crash {moment} {write}": OFTEN for write, moment in product(WRITES, get_args(Moment))}
    play_until_taken(required, Restarts, "few workers, scaled", "scaled in", examples=19, steps=45)
