"""What `kvpilot explain` says of each way in which a decision can end: short, whole, in plain English."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest
from tests.operator.backtest.scenes import SCENES

from kvpilot_operator.backtest.simulation import Simulation
from kvpilot_operator.status.explain import explain
from kvpilot_operator.status.history import history_of
from kvpilot_operator.status.model import Status
from kvpilot_operator.status.overrides import Overrides
from kvpilot_operator.status.story import MAX_LINES
from kvpilot_operator.status.why_not import known_of, why_not
from kvpilot_operator.tuning.configuration import KNOBS

ODD = [
    (r"(?<![\d.])1 (replica|row|request|worker|time|slot|engine)s\b", "one of many"),
    (r"\b[a-z]+_[a-z]+\b", "a name of the code"),
    (r"\b(None|True|False|nan|inf)\b", "a value of the code"),
    (r"  |\.\.|\( |;\.|: \.", "typography"),
]
"""What no sentence holds."""


@cache
def played(name: str) -> Simulation:
    return SCENES[name][0]()


def records(sim: Simulation) -> list[dict[str, Any]]:
    """As the ConfigMap of decisions holds them."""
    return [json.loads(json.dumps(asdict(record), default=str)) for record in sim.records]


def assert_plain(sentence: str) -> None:
    assert sentence.endswith("."), sentence
    for pattern, what in ODD:
        found = re.search(pattern, sentence)
        assert found is None, f"{what}, {found and found[0]!r}: {sentence}"


@pytest.mark.parametrize("name", SCENES)
def test_a_decision_is_at_most_twenty_lines_of_plain_sentences(name: str) -> None:
    sim = played(name)
    assert SCENES[name][1] in sim.outcomes(), sim.report()
    explained = explain(sim.cluster.manifest, records(sim), last=50, now=sim.cluster.now)
    assert [action.outcome for action in explained.actions] == sim.outcomes()
    for action in explained.actions:
        assert 1 + len(action.story) <= MAX_LINES == 20
        for sentence in action.story:
            assert_plain(sentence)
    for sentence in (*explained.present, *explained.why_not):
        assert_plain(sentence)


@pytest.mark.parametrize("name", SCENES)
def test_the_whole_why_not_of_each_knob_is_at_most_twenty_lines_of_plain_sentences(name: str) -> None:
    sim = played(name)
    manifest = sim.cluster.manifest
    status = Status.model_validate(manifest["status"])
    entries = history_of(status, records(sim))
    known = known_of(manifest, status, entries, Overrides(), sim.cluster.now)
    for knob in KNOBS:
        lines = why_not(known, knob)
        assert 2 <= len(lines) <= MAX_LINES
        for sentence in lines:
            assert_plain(sentence)


def test_many_remedies_that_were_not_chosen_and_many_replicas_take_no_more_lines() -> None:
    [started, *_] = records(played("promoted"))
    names = [f"chat-{index}" for index in range(40)]
    rejected = [{"rule": f"rule-{n}", "reason": "AtBound", "message": f"bound {n}"} for n in range(60)]
    record = {**started, "controls": names, "rejected": rejected}
    [action] = explain(played("promoted").cluster.manifest, [record], last=50).actions[:1]
    assert len(action.story) <= 6
    assert "with 40 other replicas as controls" in " ".join(action.story)
