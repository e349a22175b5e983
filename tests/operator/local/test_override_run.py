"""The commands against a run with real engines: what they ask for happens, and ends when it is ended."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from tests.operator.local.deployment import Deployment, manifest_of
from typer.testing import CliRunner

from kvpilot_operator.cli import app
from kvpilot_operator.reconcile.reconciler import Reconciliation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]


def workers(result: Reconciliation) -> set[int]:
    """Values of numWorkers that the engines run."""
    ready = (replica.engine for replica in result.observation.ready)
    return {engine.config.get("numWorkers", 0) for engine in ready if engine is not None}


async def test_pin_pause_boost_and_their_ends(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path, manifest_of({"numWorkers": 2}, scaling={"min": 1, "max": 2}))

    async def kvpilot(*arguments: str) -> str:
        command = [*arguments, "--run", str(tmp_path / "cured")]
        done = await asyncio.to_thread(CliRunner().invoke, app, command)
        assert done.exit_code == 0, done.output
        return str(done.stdout)

    async with deployment.running():
        await kvpilot("pin", "cured", "numWorkers", "3", "--by", "ana")
        await deployment.until(lambda result: workers(result) == {3}, 90)
        assert deployment.records[-1].outcome == "Pinned"

        await kvpilot("pause", "cured", "--by", "ana")
        await deployment.until(lambda result: result.observation.paused_by, 60)
        pinned = await kvpilot("explain", "cured", "--why-not", "numWorkers")
        assert pinned.startswith("numWorkers is 3 by a pin; without it, it is 2.\nOverride cured-pin-")

        # A pause of tuning leaves boosts alone.
        await kvpilot("boost", "cured", "2")
        await deployment.until(lambda result: result.observation.desired_replicas == 2, 60)
        shown = json.loads(await kvpilot("status", "cured", "-o", "json"))
        assert sorted(item["kind"] for item in shown["overrides"]) == ["boost", "pause", "pin"]
        assert all(item["inForce"] for item in shown["overrides"])

        [figures, *_] = json.loads(await kvpilot("top", "cured", "--interval", "1", "-o", "json"))
        assert figures["problem"] in {"", "does not answer"}

        await kvpilot("resume", "cured")
        await kvpilot("unpin", "cured", "numWorkers")
        await deployment.until(lambda result: workers(result) == {2} and not result.observation.paused_by, 90)
        assert "Unpinned" in {record.outcome for record in deployment.records}

        # What cannot be done is reported once, and is over.
        await kvpilot("rollback", "cured", "--to", "1", "--by", "ana")
        await deployment.until(lambda _: deployment.records[-1].outcome == "Refused", 60)
        await deployment.until(lambda result: not result.snapshot.overrides.rollback, 60)
        assert any("has no effect: the tuned knobs are those" in line for line in deployment.reported)
        assert "  Overrides   boost until " in await kvpilot("status", "cured")
        assert "Refused" in await kvpilot("history", "cured", "--last", "1")
