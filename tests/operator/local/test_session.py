"""A run without engines: what an edit of the manifest changes while it goes on, and how it ends."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvpilot_operator.adapters.scrape_metrics import ScrapeMetrics
from kvpilot_operator.load.chat import ChatWorkload
from kvpilot_operator.load.results import Tally
from kvpilot_operator.load.workload import Phase
from kvpilot_operator.local.recorder import Point
from kvpilot_operator.local.router import Router
from kvpilot_operator.local.session import Outcome, RunOptions, Session
from kvpilot_operator.local.state import StateDirectory
from kvpilot_operator.local.watch import document_of

LOAD = ChatWorkload([Phase("chat", 1, rate=1)])


class Told:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def open(self) -> None: ...

    def close(self) -> None: ...

    def tell(self, line: str) -> None:
        self.lines.append(line)

    def show(self, point: Point, tally: Tally | None) -> None: ...

    async def until(self, part: str) -> None:
        async with asyncio.timeout(20):
            while not any(part in line for line in self.lines):  # noqa: ASYNC110 - lines of another task
                await asyncio.sleep(0.01)


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
async def session_of(path: Path, **options: Any) -> AsyncIterator[tuple[Session, Told]]:
    """A session that is yet to be run."""
    asked = {"mode": None, "workload": None, "check": False, "seconds": None, "pace_scale": 1.0, **options}
    state, router, told = StateDirectory("chat", path.parent), Router("127.0.0.1", 0), Told()
    state.open()
    await router.start()
    try:
        yield Session(document_of(path, None), RunOptions(path, **asked), state, router, told), told
    finally:
        state.close()


async def edited(path: Path, monkeypatch: pytest.MonkeyPatch, **spec: Any) -> Outcome:
    """What a run leaves whose manifest is edited."""
    monkeypatch.setattr("kvpilot_operator.local.watch.LOOK_S", 0.01)
    async with session_of(path) as (session, told):
        run = asyncio.create_task(session.run())
        try:
            await told.until("starting its engines")
            written(path, **spec)
            await told.until("applied")
        finally:
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
    return session.outcome


@pytest.mark.parametrize(("before", "after", "scrape_s"), [("Standard", "Fast", 1), ("Fast", "Standard", 15)])
async def test_an_edited_pace_brings_its_own_scrape_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, scrape_s: float
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(ScrapeMetrics, "scrape_every", lambda _, interval_s: asked.append(interval_s))
    path = written(tmp_path / "chat.yaml", tuning={"pace": before})
    await edited(path, monkeypatch, tuning={"pace": after})
    assert asked == [scrape_s]


async def test_the_figures_are_of_the_profile_as_it_was_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "chat.yaml", profile="development")
    outcome = await edited(path, monkeypatch, profile="production")
    assert outcome.profile == "production"


async def test_engines_that_never_serve_end_the_run_with_their_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    monkeypatch.setattr("kvpilot_operator.local.replicas.LONGEST_BACKOFF_S", 0.05)
    path = written(tmp_path / "chat.yaml", replicas=2)
    async with session_of(path, workload=LOAD) as (session, _), asyncio.timeout(20):
        outcome = await session.run()
    assert outcome.problem == (
        "an engine ended 3 times before it was ready, the last time with status 1: no luck"
    )
    assert not outcome.bad_input


async def test_the_load_waits_no_longer_than_it_may_for_its_engines(tmp_path: Path) -> None:
    path = written(tmp_path / "chat.yaml")  # without a replica nothing is ever ready
    async with session_of(path, workload=LOAD, start_s=0.2) as (session, _), asyncio.timeout(20):
        outcome = await session.run()
    assert outcome.problem == "not all engines were ready within 0.2 s"
