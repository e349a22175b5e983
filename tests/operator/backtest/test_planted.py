"""Planted changes: they begin in every run, and their figures say what became of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.operator.cli.runs import refused, started

from kvpilot_operator.backtest.planted import PlantedResult, play, runs_of, summary
from kvpilot_operator.resource.load import load_document

MANIFEST = Path("examples/production.yaml")


def test_run_begins_a_change_and_ends_with_its_verdict() -> None:
    jobs = runs_of(
        load_document(MANIFEST), "regression", 2.0, 3, replicas=2, pace="Fast", sticky=True, seed=5
    )
    assert [(job.seed, job.utilisation) for job in jobs] == [(5, 0.9), (6, 1.0), (7, 1.1)]
    result = play(jobs[2])
    assert result.outcome in ("Promoted", "Reverted", "Aborted"), result.report
    assert result.seconds is not None and result.seconds > 0
    assert play(jobs[2]) == result, "the seed decides all"


def failing(runs: Sequence[int], **fields: float) -> list[PlantedResult]:
    """Some of the runs of a knob without effect, in which 1% of the sessions fail; they are sticky."""
    document = load_document(MANIFEST)
    jobs = runs_of(document, "aa", 1.0, max(runs) + 1, replicas=3, pace="Fast", sticky=True, seed=0)
    return [play(replace(jobs[run], broken_sessions=0.01, **fields)) for run in runs]


def test_sessions_that_fail_on_the_canary_by_chance_are_no_harm() -> None:
    """In these, sessions of the canary fail twice as often as the others."""
    for result in failing((13, 33, 38)):
        assert result.verdict in ("NoGain", "Inconclusive", "BreachGone"), result.report


def test_a_change_that_makes_requests_fail_beside_them_is_harm() -> None:
    for result in failing((0, 1, 2), errors=0.2):
        assert (result.verdict, result.in_force) == ("Harmful", False), result.report


def test_summary_counts_every_end() -> None:
    def ended(verdict: str, outcome: str, seconds: float | None, in_force: bool = False) -> PlantedResult:
        return PlantedResult(verdict, outcome, seconds, in_force, "")

    results = [
        ended("Promoted", "Promoted", 10.0, in_force=True),
        ended("Harmful", "Reverted", 20.0),
        ended("NoGain", "Reverted", 30.0),
        ended("BreachGone", "Aborted", 60.0),
        ended("", "", None),
        ended("NotStarted", "", None),
    ]
    assert summary(results) == {
        "runs": 6, "promoted": 1, "harmful": 1, "no_gain": 1, "aborted": 1, "caught": 3, "median_s": 25.0,
        "inconclusive": 0, "open": 1, "not_started": 1,
    }  # fmt: skip


def test_command_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "aa.json"
    done = started(
        "backtest", str(MANIFEST), "--aa", "2", "--pace", "Fast", "--replicas", "2", "--json", str(out)
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(out.read_text())
    assert list(figures)[:7] == ["runs", "promoted", "harmful", "no_gain", "aborted", "caught", "median_s"]
    assert figures["runs"] == 2
    assert "2/2 runs" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--aa", "0"), "--aa: runs must be from 1 to 100000, got 0"),
        (("--regression", "0.5", "3"), "--regression: the factor must be from 1 to 100, got 0.5"),
        (
            ("--aa", "1", "--replicas", "1"),
            "--replicas: must be from 2 to 1000, as one replica has no controls",
        ),
    ],
)
def test_invalid_options_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    line = refused("backtest", str(MANIFEST), *arguments)
    assert line.startswith(f"kvpilot backtest: {message}"), line


def test_missing_manifest_is_one_line() -> None:
    assert "no-such.yaml" in refused("backtest", "no-such.yaml", "--aa", "1")
