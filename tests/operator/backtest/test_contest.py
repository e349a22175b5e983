"""Comparisons: the same load for all, figures for each, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.operator.cli.runs import refused, started

from kvpilot_operator.backtest.contest import DEFAULTS, ContestRun, best, parse_against, play
from kvpilot_operator.backtest.scenes import LoadSpec, scene_of
from kvpilot_operator.backtest.tables import lines_of, table
from kvpilot_operator.options import OptionError
from kvpilot_operator.resource.load import load_document

MANIFEST = load_document(Path("examples/production.yaml"))
FAST = {**MANIFEST, "spec": {**MANIFEST["spec"], "tuning": {"pace": "Fast"}}}
KEYS = [
    "controller", "seed", "violation_minutes", "gpu_hours", "time_to_cure_s", "reversals", "wrong_direction",
    "hold_minutes",
]  # fmt: skip


def mooncake(path: Path, times: list[float]) -> Path:
    rows = [
        {"timestamp": 1000 * at, "input_length": 600, "output_length": 20, "hash_ids": [0, index]}
        for index, at in enumerate(times)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_every_baseline_plays_the_step() -> None:
    scene = scene_of(FAST, LoadSpec(synthetic="step", seconds=120))
    rows = {
        name: play(ContestRun(FAST, scene, name, given, seed=1, start_s=5.0))
        for name, given in {"kvpilot": "", **DEFAULTS}.items()
    }
    assert rows["do-nothing"]["violation_minutes"] > rows["always-max"]["violation_minutes"]
    assert rows["always-max"]["gpu_hours"] == pytest.approx(10 * 120 / 3600)
    assert rows["do-nothing"]["gpu_hours"] == pytest.approx(2 * 120 / 3600)
    assert rows["oracle"]["violation_minutes"] <= 0.5
    assert rows["hpa"]["gpu_hours"] > rows["do-nothing"]["gpu_hours"]
    lines = lines_of(list(rows.values()))
    assert [line.controller for line in lines] == list(rows)
    assert any("lambda 10" in line for line in table(lines))


def test_same_seed_gives_the_same_row_and_another_seed_another_load() -> None:
    scene = scene_of(FAST, LoadSpec(synthetic="sine", seconds=300))
    job = ContestRun(FAST, scene, "kvpilot", "", seed=4)
    assert play(job) == play(job)
    first, other = ([request.at for request in scene.requests(seed)] for seed in (4, 5))
    assert first != other


def test_trace_is_laid_over_itself_until_its_busiest_minute_needs_more_replicas(tmp_path: Path) -> None:
    times = [0.5 * index for index in range(600)]
    scene = scene_of(FAST, LoadSpec(trace=mooncake(tmp_path / "t.jsonl", times)))
    assert scene.peak > 2 * scene.capacity, "more than the least number of replicas serves"
    requests = list(scene.requests(1))
    assert len(requests) == pytest.approx(scene.scale * 600, rel=0.05)
    arrivals = [request.at for request in requests]
    assert arrivals == sorted(arrivals)
    assert {request.cached for request in requests} == {0.0, 512.0}, (
        "the first block is known after the first"
    )


def test_scale_of_one_replays_the_trace_as_it_is(tmp_path: Path) -> None:
    times = [0.5 * index for index in range(601)]
    scene = scene_of(FAST, LoadSpec(trace=mooncake(tmp_path / "t.jsonl", times), scale=1.0))
    assert [request.at for request in scene.requests(1)] == times[:-1]


def test_command_writes_rows_and_report(tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    trace = mooncake(tmp_path / "t.jsonl", [0.5 * index for index in range(300)])
    done = started(
        "backtest", "--trace", str(trace), "--pace", "Fast", "--seeds", "2", "--against", "do-nothing,hpa",
        "--start-seconds", "5", "--faults", "slow@30+60", "--json", str(out), "--report", str(page),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(out.read_text())
    assert [list(row) for row in figures["rows"]] == [KEYS] * 6
    assert [(row["controller"], row["seed"]) for row in figures["rows"]] == [
        (name, seed) for name in ("kvpilot", "do-nothing", "hpa") for seed in (1, 2)
    ]
    assert figures["settings"]["parameters"] == {"do-nothing": "", "hpa": "busy:0.8"}
    assert "6/6 runs" in done.stderr
    html = page.read_text()
    assert "<svg" in html and "do-nothing" in html and "http" not in html, "nothing is loaded from elsewhere"


BROKEN = [
    ("", "is empty"),
    ("hello\n", ":1: must be a JSON object (Mooncake) or the header"),
    ('{"timestamp": 0}\n', ":1: input_length: must be a whole number from 1 to 1e+07, got nothing"),
    (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:50,10,5\n2023-11-16 18:15:46,10,5\n",
        ":3: arrives 4 s before the request of the line above; a trace must be in order of arrival",
    ),
]


@pytest.mark.parametrize(("text", "message"), BROKEN, ids=["empty", "no format", "broken line", "unordered"])
def test_invalid_trace_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(text)
    line = refused("backtest", "--trace", str(path))
    assert line.startswith(f"kvpilot backtest: trace {path}")
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--load", "step", "--against", "hpa,magic"), "--against: must be of hpa, keda,"),
        (("--load", "step", "--seeds", "0"), "--seeds: must be from 1 to 10000, got 0"),
        (("--load", "step", "--start-seconds", "-1"), "--start-seconds: must be from 0 to 3600, got -1"),
        (("--load", "step", "--replicas", "3"), "--replicas: needs --aa, --regression or --gain"),
        (("--aa", "3", "--seeds", "3"), "--seeds: needs --trace or --load"),
        (("--load", "step", "--faults", "fire"), "--faults: must be NAME"),
        (("--load", "step,hill"), "--load: must be of step, ramp, spike, diurnal, sine, got hill"),
        (("--load", ""), "--load: must be of step, ramp, spike, diurnal, sine, got nothing"),
        (("--load", "step,sine", "--report", "r.html"), "--report: needs one load, got 2"),
        ((), "one of --trace, --load, --aa, --regression, --gain is required, got none of them"),
        (("--trace", "no-such.jsonl"), "trace no-such.jsonl: cannot be read: No such file"),
    ],
)
def test_invalid_options_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    line = refused("backtest", *arguments)
    assert line.startswith(f"kvpilot backtest: {message}"), line


def test_loads_are_played_in_turn(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = started(
        "backtest", "--load", "sine,step", "--pace", "Fast", "--duration", "300", "--seeds", "1",
        "--against", "do-nothing", "--start-seconds", "5", "--json", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["loads"]
    assert [one["settings"]["load"] for one in found] == ["sine", "step"]
    assert [[row["controller"] for row in one["rows"]] for one in found] == [["kvpilot", "do-nothing"]] * 2


def test_baselines_are_named_once_and_kvpilot_always_plays() -> None:
    assert parse_against("hpa, keda,hpa,kvpilot") == ("hpa", "keda")
    with pytest.raises(OptionError, match="got magic"):
        parse_against("magic")


def test_training_chooses_the_least_score() -> None:
    assert best([("hpa", "busy:0.5", 9.0), ("hpa", "busy:0.8", 7.0), ("keda", "waiting:5", 3.0)]) == {
        "hpa": "busy:0.8",
        "keda": "waiting:5",
    }
