"""The README's first command: a breach, its diagnosis, a knob changed hot on a canary, the cure."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from tests.operator.local.runs import up

pytestmark = [pytest.mark.slow]

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart.yaml"


@pytest.mark.alone
@pytest.mark.timeout(420)
@pytest.mark.flaky(reruns=1)
async def test_knob_cures_the_breach(tmp_path: Path) -> None:
    outputs = ("--json", "figures.json", "--report", "report.html")
    async with up(tmp_path, str(QUICKSTART), "--load", "chat", "--check", *outputs) as run:
        assert await run.ended(400) == 0, run.lines
    assert any("check passed: cured: numWorkers 1 -> " in line for line in run.lines), run.lines
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["load"]["errors"].keys() <= {"cancelled"}
    assert [step["name"] for step in figures["check"]["steps"] if step["at"] is not None] == [
        "breach",
        "diagnosis",
        "change",
        "met again",
        "same replicas",
    ]
    started = next(record for record in figures["records"] if record["outcome"] == "Started")
    assert started["diagnosis"]["stage"] == "admission_wait"
    page = (tmp_path / "report.html").read_text()
    assert started["summary"] in page
    assert not re.search(r"""(src|href)=["']?http|@import|url\(""", page)


@pytest.mark.timeout(600)
async def test_check_fails_on_a_breach_without_tuning(tmp_path: Path) -> None:
    arguments = ("--load", "chat", "--check", "--mode", "Off", "--duration", "150")
    async with up(tmp_path, str(QUICKSTART), *arguments) as run:
        await run.until("p50=Breached", 300)
        run.process.send_signal(signal.SIGINT)
        assert await run.ended() == 1, run.lines
    fault = "check failed: no knob was changed for a breached latency objective: tuning mode is Off"
    assert fault in run.lines
