"""What rules and knobs declare about the signals fits together."""

from __future__ import annotations

import pytest

from kvpilot_operator.tuning.configuration import KNOBS
from kvpilot_operator.tuning.rules.order import REMEDIES, Remedy
from kvpilot_operator.tuning.rules.signals import EFFECTS, down, up

OF_KNOBS = [remedy for remedy in REMEDIES if remedy.knobs]


def test_every_knob_declares_what_it_does() -> None:
    assert set(EFFECTS) == set(KNOBS)


@pytest.mark.parametrize("remedy", OF_KNOBS, ids=lambda remedy: remedy.name)
def test_a_rule_lowers_each_signal_that_it_cures(remedy: Remedy) -> None:
    assert remedy.cures
    for signal in remedy.cures:
        assert any(move.effect(signal) < 0 for move in remedy.moves), signal
        if not remedy.any_knob:
            assert remedy.moves[0].effect(signal) < 0, f"{signal}: the leading knob"


def test_a_move_and_its_opposite_do_the_opposite() -> None:
    [more], [less] = up("batchSize"), down("batchSize")
    assert more.opposite == less
    assert (more.effect("memory"), less.effect("memory"), more.effect("misses")) == (1, -1, 0)
