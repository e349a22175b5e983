"""A run without engines: what an edit of the manifest changes while it goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvpilot_operator.adapters.scrape_metrics import ScrapeMetrics
from kvpilot_operator.load.results import Tally
from kvpilot_operator.local.recorder import Point
from kvpilot_operator.local.router import Router
from kvpilot_operator.local.session import RunOptions, Session
from kvpilot_operator.local.state import StateDirectory
from kvpilot_operator.local.watch import document_of


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


def written(path: Path, pace: str) -> Path:
    manifest: dict[str, Any] = {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheDeployment",
        "metadata": {"name": "chat"},
        "spec": {"replicas": 0, "tuning": {"pace": pace}},
    }
    path.write_text(yaml.safe_dump(manifest))
    return path


@pytest.mark.parametrize(("before", "after", "scrape_s"), [("Standard", "Fast", 1), ("Fast", "Standard", 15)])
async def test_an_edited_pace_brings_its_own_scrape_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, scrape_s: float
) -> None:
    monkeypatch.setattr("kvpilot_operator.local.watch.LOOK_S", 0.01)
    asked: list[float] = []
    monkeypatch.setattr(ScrapeMetrics, "scrape_every", lambda _, interval_s: asked.append(interval_s))
    path = written(tmp_path / "chat.yaml", before)
    options = RunOptions(path, mode=None, workload=None, check=False, seconds=None, pace_scale=1.0)
    state, router, told = StateDirectory("chat", tmp_path), Router("127.0.0.1", 0), Told()
    state.open()
    await router.start()
    run = asyncio.create_task(Session(document_of(path, None), options, state, router, told).run())
    try:
        await told.until("starting its engines")
        written(path, after)
        await told.until("applied")
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        state.close()
    assert asked == [scrape_s]
