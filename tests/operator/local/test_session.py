"""A session without engines: edits of the manifest during the run, and its end."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.waiting import until

from kvpilot_operator.adapters.metrics.scrape import ScrapeMetrics
from kvpilot_operator.load.chat import ChatWorkload
from kvpilot_operator.load.results import Tally
from kvpilot_operator.load.workload import LoadPhase
from kvpilot_operator.local.recorder import Point
from kvpilot_operator.local.session import RunOptions, RunResult, Session
from kvpilot_operator.local.state import StateDirectory
from kvpilot_operator.local.watch import document_of
from kvpilot_operator.router.proxy import Router

LOAD = ChatWorkload([LoadPhase("chat", 1, rate=1)])


class Reported:
    """A display that records its input."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.reconciled = asyncio.Event()

    def open(self) -> None: ...

    def close(self) -> None: ...

    def notify(self, line: str) -> None:
        self.lines.append(line)

    def show(self, point: Point, tally: Tally | None) -> None:
        self.reconciled.set()

    async def until(self, part: str) -> None:
        await until(lambda: any(part in line for line in self.lines))


def written(path: Path, **spec: Any) -> Path:
    manifest: dict[str, Any] = {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheDeployment",
        "metadata": {"name": "chat"},
        "spec": {"replicas": 0, **spec},
    }
    path.write_text(yaml.safe_dump(manifest))
    return path


@asynccontextmanager
async def session_of(path: Path, **options: Any) -> AsyncIterator[tuple[Session, Reported]]:
    """A session that has not started."""
    asked = {"mode": None, "workload": None, "check": False, "seconds": None, "pace_scale": 1.0, **options}
    state, router, reported = StateDirectory("chat", path.parent), Router("127.0.0.1", 0), Reported()
    state.open()
    await router.start()
    try:
        yield Session(document_of(path, None), RunOptions(path, **asked), state, router, reported), reported
    finally:
        state.close()


async def edited(path: Path, monkeypatch: pytest.MonkeyPatch, **spec: Any) -> RunResult:
    """Results of a run with an edit of the manifest."""
    monkeypatch.setattr("kvpilot_operator.local.watch.POLL_S", 0.01)
    async with session_of(path) as (session, reported):
        run = asyncio.create_task(session.run())
        try:
            await reported.until("starting its replicas")
            written(path, **spec)
            await reported.until("applied")
        finally:
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
    return session.result


@pytest.mark.parametrize(("before", "after", "scrape_s"), [("Standard", "Fast", 1), ("Fast", "Standard", 15)])
async def test_edited_pace_changes_the_scrape_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, scrape_s: float
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(ScrapeMetrics, "scrape_every", lambda _, interval_s: asked.append(interval_s))
    path = written(tmp_path / "chat.yaml", tuning={"pace": before})
    await edited(path, monkeypatch, tuning={"pace": after})
    assert asked == [scrape_s]


async def test_figures_name_the_last_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "chat.yaml", profile="development")
    result = await edited(path, monkeypatch, profile="production")
    assert result.profile == "production"


async def test_run_ends_with_the_message_of_engines_that_never_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    monkeypatch.setattr("kvpilot_operator.local.replicas.MAX_BACKOFF_S", 0.05)
    path = written(tmp_path / "chat.yaml", replicas=2)
    async with session_of(path, workload=LOAD) as (session, _), asyncio.timeout(60):
        result = await session.run()
    assert result.problem == (
        "an engine ended 3 times before it was ready, the last time with status 1: no luck"
    )
    assert not result.bad_input


async def test_a_run_whose_tuning_is_off_says_so_in_its_status(tmp_path: Path) -> None:
    path = written(tmp_path / "chat.yaml")
    async with session_of(path, off="kvpilot up runs with --tuning=off") as (session, reported):
        run = asyncio.create_task(session.run())
        async with asyncio.timeout(60):
            await reported.reconciled.wait()
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
    status = json.loads((tmp_path / "chat/resource.json").read_text())["status"]
    [hold, *_] = status["tuning"]["holds"]
    assert (hold["reason"], hold["message"]) == ("KillSwitch", "kvpilot up runs with --tuning=off")


async def test_load_waits_for_replicas_up_to_a_limit(tmp_path: Path) -> None:
    path = written(tmp_path / "chat.yaml")  # without a replica none becomes ready
    async with session_of(path, workload=LOAD, start_s=0.2) as (session, _), asyncio.timeout(60):
        result = await session.run()
    assert result.problem == "not all replicas were ready within 0.2 s"
