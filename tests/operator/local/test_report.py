"""What people see of a run: figures, lines, and one page that needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from kvpilot_operator.load.results import Result, Tally
from kvpilot_operator.local.display import EVENT_LINES, EVENTS, Lines, LiveTable
from kvpilot_operator.local.figures import figures_of
from kvpilot_operator.local.recorder import EngineState, Point, Recorder, knobs_of, quantiles_of
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
        profile="highPerformance",  # edited meanwhile
        policy=policy_of(RESOURCE.spec),
        verdict=judge_run([POINT], [RECORD], ("p95",), "Auto"),
        started=1000.0,
        ended=1010.0,
    )


def test_figures_are_plain_data_from_the_start_of_the_run() -> None:
    figures = json.loads(json.dumps(figures_of(RESOURCE, outcome())))
    assert figures["seconds"] == 10
    assert figures["profile"] == "highPerformance"
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
    """All text of the page once its script has run."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node to run the page's script with")
    page = report_html(figures, checked=True)
    done = subprocess.run([node, "-e", BROWSER], input=page, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_page_draws_a_run_of_very_many_requests() -> None:
    figures = figures_of(RESOURCE, outcome())
    figures["requests"] = [[1.0, 0.5 + index / 100_000] for index in range(200_000)]
    text = drawn(figures)
    assert "Latency (whole answer)" in text
    assert "is drawn" not in text
    assert "A long run: one look in 4 is drawn." in drawn({**figures, "looks_per_point": 4})


@pytest.mark.parametrize(("outcome_", "told"), [("Started", 1), ("Recommended", 1), ("Promoted", 0)])
def test_a_decision_is_drawn_with_its_diagnosis(outcome_: Any, told: int) -> None:
    run = outcome()
    run.records = [replace(RECORD, outcome=outcome_)]
    assert drawn(figures_of(RESOURCE, run)).count("Diagnosis: x") == told


def test_a_long_run_keeps_few_points_and_always_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpilot_operator.local.recorder.MOST_POINTS", 8)
    monkeypatch.setattr(
        "kvpilot_operator.local.recorder.point_of", lambda look, _: replace(POINT, at=float(look.at))
    )
    seen: list[Point] = []
    recorder = Recorder(lambda: "", seen.append, lambda _: None)
    for at in range(100):
        look: Any = SimpleNamespace(
            at=at, policy=SimpleNamespace(objectives=None), decision=SimpleNamespace(records=())
        )
        recorder.looked(look)
        kept, every = [int(point.at) for point in recorder.points], recorder.looks_per_point
        assert len(kept) <= 8
        assert kept[-1] == at
        assert kept[:-1] == [number for number in range(at) if number % every == 0]
    assert len(seen) == 100
    assert recorder.looks_per_point == 16


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


@pytest.mark.parametrize(
    ("width", "height", "engines"), [(80, 24, 2), (80, 24, 20), (40, 10, 2), (160, 50, 2)]
)
def test_the_newest_events_are_seen_on_any_screen(width: int, height: int, engines: int) -> None:
    console = Console(width=width, height=height, force_terminal=True)
    table = LiveTable("kvpilot chat", 0.0, console)
    table.show(replace(POINT, engines=POINT.engines[:1] * engines), Tally(3))
    for number in range(20):
        table.tell(f"event {number} {'and so on ' * 9}.")
    lines = ["".join(part.text for part in line) for line in console.render_lines(table)]
    assert len(lines) <= height
    assert lines[0].startswith("kvpilot chat")
    newest = "".join(lines[-EVENT_LINES:])
    assert "event 19" in newest
    assert newest.rstrip().endswith(".")
    if height == 50:
        assert sum("event" in line for line in lines) == EVENTS


def test_quantiles_interpolate_and_failures_are_slow() -> None:
    within = {0.1: 0.0, 0.2: 50.0, 0.5: 90.0, 1.0: 90.0}
    counts = Counts(outcomes={"ok": 90.0, "shed": 10.0}, request_within=within)
    found = quantiles_of(counts, policy_of(RESOURCE.spec).objectives)
    assert found["p50"] == pytest.approx(0.2)
    assert found["p95"] == 1.0
    assert found["p99"] == 1.0
