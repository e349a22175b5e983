"""Random histories of a deployment under the real reconciler: safe at every step, and at rest in the end."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
from tests.operator.reconcile.deployment import SCENES
from tests.operator.reconcile.faulty_ports import Moment
from tests.operator.reconcile.machine import CASES, Histories, Managed, Moments, Restarts, play, taken

from kvpilot_operator.tuning.rules.order import REMEDIES

OFTEN = 50
"""How often each path is taken at least that a run is there for."""

HAPPENED = (
    *("clock jump", "lost status", "edit", "invalid edit", "refused edit", "mode", "kill switch"),
    *("pause", "pin", "boost", "rollback", "engine restarts", "pod is deleted"),
    *("fault of one replica", "fault of all"),
)
"""What the histories are there for, beside what is rehearsed."""

REHEARSED = {
    "few workers, scaled": (
        "workers-up:Started",
        "workers-up:Promoted",
        "rollback:RolledBack",
        "pin:Unpinned",
    ),
    "workers harm": ("workers-up:Reverted",),
    "saturated": ("replicas-up:ScaledOut",),
    "scaled in": ("replicas-down:ScaledIn",),
    "memory": ("memory-relief:Started",),
    "exhausted": ("memory-emergency:Emergency",),
    "prefetch": ("prefetch-up:Started", "prefetch-up:Aborted"),
    "few hits": ("cache-quota-up:Started",),
    "no relief": ("taken back",),
    "few rows": ("batch-up:Started",),
    "short steps": ("step-tokens-up:Started",),
    "crowded": ("workers-down:Started",),
    "waste": ("prefetch-down:Started",),
    "codec": ("compression-down:Started",),
    "few blocks": ("compression-up:Started",),
    "fixed strategy": ("strategy-adaptive:Started",),
}
"""Scenes and what the tuner does in them, each ``OFTEN`` times, while something happens shortly before."""

MAX_ROUNDS = 16
"""Rounds of histories in which every path must have been taken often enough. Three or four are usual."""


DONE = tuple(path for paths in REHEARSED.values() for path in paths)


def rehearse() -> Iterator[None]:
    """Play what happens shortly before each thing that was not done often enough."""
    for number in range(MAX_ROUNDS):
        for index, (scene, paths) in enumerate(REHEARSED.items()):
            if few := tuple(path for path in paths if taken[path] < OFTEN):
                machine = partial(Moments, paths=few)
                play(machine, scene, 100 * index + number, examples=len(few), steps=20)
                yield


def restart() -> Iterator[None]:
    """Let the operator die before and after each write at which it did not die often enough."""
    for number in range(MAX_ROUNDS):
        for index, scene in enumerate(("few workers, scaled", "scaled in")):
            few = tuple(case for case in CASES if taken[died(*case)] < OFTEN)
            play(partial(Restarts, cases=few), scene, 100 * index + number, examples=3, steps=45)
            yield


def died(write: str, moment: Moment) -> str:
    """The path of a crash."""
    return f"crash {moment} {write}"


def histories(machine: type[Managed], *scenes: str, examples: int, steps: int) -> Iterator[None]:
    """Play histories of each scene in turn."""
    for number in range(MAX_ROUNDS):
        for index, scene in enumerate(scenes):
            play(machine, scene, 100 * index + number, examples=examples, steps=steps)
            yield


def until_taken(required: dict[str, int], plays: Iterator[None]) -> None:
    """Play histories until every path was taken as often as required."""
    while rare(required):
        if next(plays, False) is False:
            pytest.fail(
                f"taken too seldom to prove anything: {rare(required)} of {dict(sorted(taken.items()))}"
            )


def rare(required: dict[str, int]) -> dict[str, int]:
    """How often the paths were taken that were not taken often enough."""
    return {path: taken[path] for path, number in required.items() if taken[path] < number}


@pytest.mark.parametrize("machine", [Histories, Moments, Restarts])
def test_a_few_histories(machine: type[Managed]) -> None:
    for number, scene in enumerate(("few workers, scaled", "scaled in")):
        play(machine, scene, number, examples=1, steps=15)


def test_every_rule_is_rehearsed() -> None:
    assert {remedy.name for remedy in REMEDIES} <= {path.partition(":")[0] for path in DONE}
    assert {path.partition(":")[2] for path in DONE} >= {"Promoted", "Reverted", "Aborted", "Emergency"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_that_happens_makes_the_operator_unsafe() -> None:
    taken.clear()
    until_taken(dict.fromkeys(DONE, OFTEN), rehearse())
    whole = histories(Histories, *(scene.name for scene in SCENES), examples=1, steps=40)
    for _ in SCENES:
        next(whole)
    until_taken(dict.fromkeys(HAPPENED, OFTEN), whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_operator_may_die_before_and_after_every_write() -> None:
    taken.clear()
    until_taken({died(*case): OFTEN for case in CASES}, restart())
