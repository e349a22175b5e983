"""Output of a run: figures, lines of progress, the live table and the self-contained page."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from kvpilot_operator.load.results import RequestResult, Tally
from kvpilot_operator.local.check import check_run
from kvpilot_operator.local.display import EVENT_LINES, EVENTS, Lines, LiveTable
from kvpilot_operator.local.figures import figures_of
from kvpilot_operator.local.recorder import Point, Recorder, ReplicaPoint, knobs_of, quantiles_of
from kvpilot_operator.local.report import report_html
from kvpilot_operator.local.session import RunResult
from kvpilot_operator.resource.model import KVCacheDeployment
from kvpilot_operator.resource.resolve import policy_of
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
    replicas=(
        ReplicaPoint("a", "engine-1", True, 0, 2, knobs_of({"numWorkers": 8})),
        ReplicaPoint("b", "engine-2", True, 1, 1, knobs_of({"numWorkers": 2})),
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


def run_result() -> RunResult:
    tally = Tally(2, [RequestResult("rise", 1.0, 0, 0.5, prompt_tokens=10, cached_tokens=5)])
    return RunResult(
        points=[POINT],
        records=[RECORD],
        results=tally.results,
        load=tally.summary(3),
        load_started=1001.0,
        profile="highPerformance",  # edited meanwhile
        policy=policy_of(RESOURCE.spec),
        check=check_run([POINT], [RECORD], ("p95",), "Auto"),
        started=1000.0,
        ended=1010.0,
    )


def test_figures_are_plain_data_relative_to_the_start_of_the_run() -> None:
    figures = json.loads(json.dumps(figures_of(RESOURCE, run_result())))
    assert figures["seconds"] == 10
    assert figures["profile"] == "highPerformance"
    assert figures["points"][0]["at"] == 5
    assert figures["points"][0]["replicas"][0]["knobs"]["numWorkers"] == 8
    assert figures["records"][0]["changes"] == [{"knob": "numWorkers", "before": 2, "after": 8}]
    assert figures["requests"] == [[2.0, 0.5]]
    assert figures["objectives"]["latency"]["p95"] == {"edge_s": 0.5, "required": 0.95}
    assert figures["check"]["steps"][0]["at"] == 5


def test_page_is_self_contained_and_escapes_its_data() -> None:
    figures = figures_of(RESOURCE, run_result())
    page = report_html(figures, checked=True)
    assert not re.search(r"""(src|href)=["']?(http|//)|@import|url\(""", page)
    assert page.count("</script>") == 2
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["records"][0]["summary"] == RECORD.summary


BROWSER = """
const nodes = {};
class Node {
  constructor() { this.children = []; this.style = {}; }
  setAttribute() {}
  addEventListener() {}
  append(...children) { this.children.push(...children); }
  get text() { return [this.textContent || "", ...this.children.map((c) => c.text ?? c)].join(" "); }
}
globalThis.document = {
  createElement: () => new Node(), createElementNS: () => new Node(),
  getElementById: (id) => (nodes[id] ??= new Node()),
};
const page = require("node:fs").readFileSync(0, "utf8");
const scripts = [...page.matchAll(/<script[^>]*>([\\s\\S]*?)<.script>/g)].map((m) => m[1]);
document.getElementById("data").textContent = scripts[0];
(0, eval)(scripts[1]);
console.log(nodes.main.text);
"""


def drawn(figures: Mapping[str, Any]) -> str:
    """All text of the page after its script has run."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node to run the page's script with")
    page = report_html(figures, checked=True)
    done = subprocess.run([node, "-e", BROWSER], input=page, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_page_draws_a_run_with_very_many_requests() -> None:
    figures = figures_of(RESOURCE, run_result())
    figures["requests"] = [[1.0, 0.5 + index / 100_000] for index in range(200_000)]
    text = drawn(figures)
    assert "Latency (whole answer)" in text
    assert "is drawn" not in text
    assert "A long run: one reconcile in 4 is drawn." in drawn({**figures, "reconciles_per_point": 4})


@pytest.mark.parametrize(("outcome", "reported"), [("Started", 1), ("Recommended", 1), ("Promoted", 0)])
def test_page_shows_a_decision_with_its_diagnosis(outcome: Any, reported: int) -> None:
    run = run_result()
    run.records = [replace(RECORD, outcome=outcome)]
    assert drawn(figures_of(RESOURCE, run)).count("Diagnosis: x") == reported


def test_long_run_keeps_a_bounded_number_of_points_with_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpilot_operator.local.recorder.MAX_POINTS", 8)
    monkeypatch.setattr(
        "kvpilot_operator.local.recorder.point_of", lambda result, _: replace(POINT, at=float(result.at))
    )
    seen: list[Point] = []
    recorder = Recorder(lambda: "", seen.append, lambda _: None)
    for at in range(100):
        result: Any = SimpleNamespace(
            at=at, policy=SimpleNamespace(objectives=None), decision=SimpleNamespace(records=())
        )
        recorder.reconciled(result)
        kept, every = [int(point.at) for point in recorder.points], recorder.reconciles_per_point
        assert len(kept) <= 8
        assert kept[-1] == at
        assert kept[:-1] == [number for number in range(at) if number % every == 0]
    assert len(seen) == 100
    assert recorder.reconciles_per_point == 16


def test_lines_show_differences_between_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpilot_operator.local.display.LINE_S", math.inf)
    written: list[str] = []
    lines = Lines(0.0, written.append)
    lines.notify("hello")
    lines.show(POINT, None)
    lines.show(POINT, None)  # too soon
    assert len(written) == 2
    assert "p50 250 ms  p95 1500 ms" in written[1]
    assert "numWorkers 8/2" in written[1]
    assert "p95=Breached throughput=Met" in written[1]


def test_table_shows_objectives_replicas_and_knobs() -> None:
    console = Console(width=160, record=True, force_terminal=True)
    table = LiveTable("kvpilot chat", 0.0, console)
    table.open()
    table.notify("ChangeStarted: d-0001")
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


@pytest.mark.parametrize(
    ("width", "height", "engines"), [(80, 24, 2), (80, 24, 20), (40, 10, 2), (160, 50, 2)]
)
def test_table_shows_the_newest_events_at_any_height(width: int, height: int, engines: int) -> None:
    console = Console(width=width, height=height, force_terminal=True)
    table = LiveTable("kvpilot chat", 0.0, console)
    table.show(replace(POINT, replicas=POINT.replicas[:1] * engines), Tally(3))
    for number in range(20):
        table.notify(f"event {number} {'and so on ' * 9}.")
    lines = ["".join(part.text for part in line) for line in console.render_lines(table)]
    assert len(lines) <= height
    assert lines[0].startswith("kvpilot chat")
    newest = "".join(lines[-EVENT_LINES:])
    assert "event 19" in newest
    assert newest.rstrip().endswith(".")
    if height == 50:
        assert sum("event" in line for line in lines) == EVENTS


def test_quantiles_interpolate_and_count_failures_as_slow() -> None:
    within = {0.1: 0.0, 0.2: 50.0, 0.5: 90.0, 1.0: 90.0}
    counts = Counts(outcomes={"ok": 90.0, "shed": 10.0}, request_within=within)
    found = quantiles_of(counts, policy_of(RESOURCE.spec).objectives)
    assert found["p50"] == pytest.approx(0.2)
    assert found["p95"] == 1.0
    assert found["p99"] == 1.0
