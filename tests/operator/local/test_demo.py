"""The README's first command: a breach, its diagnosis, a knob changed hot on a canary, the cure."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow]

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart.yaml"


async def demo(directory: Path, *arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from kvpilot_operator.cli import app; app()"),
        *("up", str(QUICKSTART), "--load", "chat", "--check", *arguments),
        cwd=directory,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output.decode()


@pytest.mark.alone
@pytest.mark.timeout(420)
@pytest.mark.flaky(reruns=1)
async def test_knob_cures_the_breach(tmp_path: Path) -> None:
    code, output = await demo(tmp_path, "--json", "figures.json", "--report", "report.html")
    assert code == 0, output
    assert "check passed: cured: numWorkers 1 -> " in output
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


@pytest.mark.timeout(300)
async def test_breach_stays_without_tuning(tmp_path: Path) -> None:
    code, output = await demo(tmp_path, "--mode", "Off", "--duration", "90")
    assert code == 1, output
    assert "check failed: no knob was changed for a breached latency objective: tuning mode is Off" in output
