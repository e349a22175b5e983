"""Replicas as engine processes: started, restarted after a crash, drained, and never orphaned."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest
from tests.waiting import until

from kvpilot_operator.local.process import Launch
from kvpilot_operator.local.replicas import BAD_START, MAX_FAILED_STARTS, ReplicaSet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]  # the start of an engine takes 10 s of CPU time

ARGUMENTS = ["--model", "builtin/tiny-llama", "--drain-seconds", "60", "--drain-lag-seconds", "0"]
START_S = 150.0  # engines start slowly on a crowded machine
CONFIG = "generation: 1\nconfig: {dtype: float32, maxTokens: 2048, numWorkers: 2}\n"


def fronts(directory: Path, parent: int | None = None) -> list[psutil.Process]:
    """Front processes of engines whose configuration is in that directory, whatever their parent."""
    children = psutil.Process(parent).children()
    config = str(directory / "config.yaml")
    return [child for child in children if config in (child.as_dict(["cmdline"])["cmdline"] or ())]


class Fleet:
    """A replica set and its reports."""

    def __init__(self, directory: Path) -> None:
        self.reported: list[str] = []
        self.arguments = list(ARGUMENTS)
        self.directory = directory
        config = directory / "config.yaml"
        config.write_text(CONFIG)
        self._config = config
        self.refused: list[tuple[int, str]] = []
        self.set = ReplicaSet(
            self._launch, "secret", lambda: None, lambda *end: self.refused.append(end), self.reported.append
        )

    def _launch(self, pod: str) -> Launch:
        return Launch(
            [*self.arguments, "--config", str(self._config)],
            {"KVPILOT_ADMIN_TOKEN": "secret"},
            self.directory / f"{pod}.log",
        )

    @property
    def ready(self) -> list[str]:
        return [replica.name for replica in self.set.replicas if replica.ready]


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    running = fronts(tmp_path)
    await fleet.set.close(1)
    assert not any(process.is_running() for process in running)


async def test_scaled_in_replicas_leave_the_router_first_and_finish_their_requests(fleet: Fleet) -> None:
    fleet.set.converge_to(2, "t", 60)
    await until(lambda: len(fleet.ready) == 2, START_S)
    last = fleet.set.backends[1]
    body = {"model": "x", "prompt": "a" * 64, "max_tokens": 300, "temperature": 0}
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{last.url}/v1/models") as answer:
            body["model"] = (await answer.json())["data"][0]["id"]
        running = asyncio.create_task(_post(session, f"{last.url}/v1/completions", body))
        await _until_running(session, last.url)
        fleet.set.converge_to(1, "t", 60)
        assert [backend.name for backend in fleet.set.backends] == ["engine-1"]
        status, answered = await running
    assert status == 200
    assert answered["usage"]["completion_tokens"] == 300
    await until(lambda: len(fleet.set.replicas) == 1, START_S)
    assert fleet.ready == ["engine-1"]
    assert fleet.reported == []


async def _post(
    session: aiohttp.ClientSession, url: str, body: dict[str, object]
) -> tuple[int, dict[str, dict[str, int]]]:
    async with session.post(url, json=body) as answer:
        return answer.status, await answer.json()


async def _until_running(session: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(60):
        while True:
            async with session.get(f"{url}/metrics") as answer:
                if "\nkvpilot_arrivals_total 1.0" in await answer.text():
                    return
            await asyncio.sleep(0.02)


async def test_crashed_engine_is_restarted_and_counted(fleet: Fleet) -> None:
    fleet.set.converge_to(1, "t", 5)
    await until(lambda: fleet.ready == ["engine-1"], START_S)
    before = fleet.set.replicas[0]
    core = fronts(fleet.directory)[0].children()[0]
    core.kill()
    await until(lambda: fleet.set.replicas[0].restarts == 1, START_S)
    assert not fleet.set.replicas[0].ready
    assert fleet.set.replicas[0].pending_reason.startswith("CrashLoopBackOff: exit status 1")
    await until(lambda: fleet.ready == ["engine-1"], START_S)
    assert fleet.set.replicas[0].uid == before.uid
    assert "engine-1 ended with status 1" in fleet.reported[0]


async def test_failed_start_is_reported_with_the_engines_message(fleet: Fleet) -> None:
    fleet.arguments[1] = "builtin/none"
    fleet.set.converge_to(1, "t", 5)
    await until(lambda: bool(fleet.reported), START_S)
    assert "builtin/none" in fleet.reported[0]
    status, words = fleet.refused[0]
    assert status == BAD_START
    assert "builtin/none" in words
    assert fleet.set.backends == []


async def test_engine_that_has_served_is_restarted_without_limit(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpilot_operator.local.replicas.MAX_BACKOFF_S", 0.05)
    fleet.set.converge_to(1, "t", 5)
    await until(lambda: fleet.ready == ["engine-1"], START_S)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    fronts(fleet.directory)[0].children()[0].kill()
    await until(lambda: fleet.set.replicas[0].restarts > MAX_FAILED_STARTS, START_S)
    assert fleet.refused == []


async def test_new_template_replaces_engines_one_at_a_time(fleet: Fleet) -> None:
    fleet.set.converge_to(2, "old", 5)
    await until(lambda: len(fleet.ready) == 2, START_S)
    old = {replica.uid for replica in fleet.set.replicas}
    fleet.set.converge_to(2, "new", 5)
    least = 2

    def replaced() -> bool:
        nonlocal least
        least = min(least, len(fleet.ready))
        return len(fleet.ready) == 2 and not old & {r.uid for r in fleet.set.replicas}

    assert fleet.set.rolling_out
    await until(replaced, START_S)
    assert least == 1
    assert not fleet.set.rolling_out


PARENT = """
    import asyncio, sys
    from pathlib import Path
    from kvpilot_operator.local.process import Launch
    from kvpilot_operator.local.replicas import ReplicaSet

    async def main():
        directory = Path(sys.argv[1])
        launch = lambda pod: Launch(["--config", str(directory / "config.yaml")], {}, directory / pod)
        fleet = ReplicaSet(launch, "", lambda: None, print, print)
        fleet.converge_to(1, "t", 5)
        while not any(replica.ready for replica in fleet.replicas):
            await asyncio.sleep(0.05)
        print("up", flush=True)
        await asyncio.sleep(600)

    asyncio.run(main())
"""


def test_no_engine_is_orphaned_when_the_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        [front] = fronts(tmp_path, parent.pid)
        family = [front, *front.children(recursive=True)]
        assert len(family) >= 2
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    assert psutil.wait_procs(family, 60)[1] == []
