"""What people see of a run: figures, lines, and one page that needs nothing else."""

from __future__ import annotations

import json
import re

import pytest
from rich.console import Console

from kvpilot_operator.load.results import Result, Tally
from kvpilot_operator.local.display import Lines, LiveTable
from kvpilot_operator.local.figures import figures_of
from kvpilot_operator.local.recorder import EngineState, Point, knobs_of, quantiles_of
from kvpilot_operator.local.report import report_html
from kvpilot_operator.local.session import Outcome
from kvpilot_operator.local.verdict import judge_run
from kvpilot_operator.spec.models import KVCacheDeployment
from kvpilot_operator.spec.resolve import policy_of
from kvpilot_operator.tuning.decision import Diagnosis, Objective, Record, StageShare
from kvpilot_operator.tuning.observation import Counts
from kvpilot_operator.tuning.state import KnobChange

RESOURCE = KVCacheDeployment.parse(
    {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheDeployment",
        "metadata": {"name": "chat"},
        "spec": {"replicas": 2},
    }
)
POINT = Point(
    at=1005.0,
    tuning="Canary",
    load_phase="rise",
    objectives=(
        Objective("p95", 0.95, 0.4, 0.6, "Breached"),
        Objective("throughput", 100, 12.5, 12.0, "Met"),
    ),
    diagnosis="waiting",
    quantiles={"p50": 0.25, "p95": 1.5},
    stages={"admission_wait": 0.2, "decode": 0.1},
    arrivals=12.5,
    completed=12.0,
    hit_rate=0.7,
    ceiling=0.8,
    memory=0.3,
    waiting=4,
    running=2,
    generation=1,
    knobs=knobs_of({}),
    engines=(
        EngineState("a", "engine-1", True, 0, 2, knobs_of({"numWorkers": 8})),
        EngineState("b", "engine-2", True, 1, 1, knobs_of({"numWorkers": 2})),
    ),
    holds=("Cooldown",),
)
RECORD = Record(
    id="d-0001",
    at=1004.0,
    rule="workers-up",
    outcome="Started",
    summary="</script><img src=x> numWorkers 2 -> 8.",
    diagnosis=Diagnosis("p95", "admission_wait", "QueueAtAdmission", "x", (StageShare("decode", 0.1, 1.0),)),
    objectives=(),
    changes=(KnobChange("numWorkers", 2, 8),),
)


def outcome() -> Outcome:
    tally = Tally(2, [Result("rise", 1.0, 0, 0.5, prompt_tokens=10, cached_tokens=5)])
    return Outcome(
        points=[POINT],
        records=[RECORD],
        results=tally.results,
        load=tally.summary(3),
        load_started=1001.0,
        policy=policy_of(RESOURCE.spec),
        verdict=judge_run([POINT], [RECORD], ("p95",), "Auto"),
        started=1000.0,
        ended=1010.0,
    )


def test_figures_are_plain_data_from_the_start_of_the_run() -> None:
    figures = json.loads(json.dumps(figures_of(RESOURCE, outcome())))
    assert figures["seconds"] == 10
    assert figures["points"][0]["at"] == 5
    assert figures["points"][0]["engines"][0]["knobs"]["numWorkers"] == 8
    assert figures["records"][0]["changes"] == [{"knob": "numWorkers", "before": 2, "after": 8}]
    assert figures["requests"] == [[2.0, 0.5]]
    assert figures["objectives"]["latency"]["p95"] == {"edge_s": 0.5, "required": 0.95}
    assert figures["verdict"]["steps"][0]["at"] == 5


def test_the_page_is_whole_and_its_data_cannot_break_out() -> None:
    figures = figures_of(RESOURCE, outcome())
    page = report_html(figures, checked=True)
    assert not re.search(r"""(src|href)=["']?(http|//)|@import|url\(""", page)
    assert page.count("</script>") == 2
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["records"][0]["summary"] == RECORD.summary


def test_lines_show_where_engines_differ() -> None:
    written: list[str] = []
    lines = Lines(0.0, written.append)
    lines.tell("hello")
    lines.show(POINT, None)
    lines.show(POINT, None)  # too soon
    assert len(written) == 2
    assert "p50 250 ms  p95 1500 ms" in written[1]
    assert "numWorkers 8/2" in written[1]
    assert "p95=Breached throughput=Met" in written[1]


def test_the_table_shows_objectives_engines_and_knobs() -> None:
    console = Console(width=160, record=True, force_terminal=True)
    table = LiveTable("kvpilot chat", 0.0, console)
    table.open()
    table.tell("ChangeStarted: d-0001")
    table.show(POINT, Tally(3))
    table.close()
    text = console.export_text()
    parts = (
        "p95 40% of 95% Breached",
        "throughput 12.5/s of 100.0/s",
        "engine-2 ready, generation 1, 1 restarts",
        "numWorkers 8/2",
        "tuning Canary (Cooldown)",
        "ChangeStarted: d-0001",
    )
    for part in parts:
        assert part in text, part


def test_quantiles_interpolate_and_failures_are_slow() -> None:
    within = {0.1: 0.0, 0.2: 50.0, 0.5: 90.0, 1.0: 90.0}
    counts = Counts(outcomes={"ok": 90.0, "shed": 10.0}, request_within=within)
    found = quantiles_of(counts, policy_of(RESOURCE.spec).objectives)
    assert found["p50"] == pytest.approx(0.2)
    assert found["p95"] == 1.0
    assert found["p99"] == 1.0
