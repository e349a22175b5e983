"""Real engines, served by real processes on free ports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from tests.waiting import eventually

TOKEN = "a token of the tests"
CONFIG = {
    "dtype": "float32", "numWorkers": 8, "batchSize": 8, "maxTokens": 16384, "maxQueue": 64,
    "cacheStrategy": "lru", "hostMemoryMb": 0,
}  # fmt: skip
READY_S = 240.0  # seconds on an idle machine; the limit is for a crowded one


class Page:
    """One metrics page: series that are compared must come from the same one."""

    def __init__(self, text: str) -> None:
        self.text = text

    def metric(self, name: str, **labels: str) -> float:
        """One series, by name and labels."""
        wanted = ",".join(f'{k}="{v}"' for k, v in labels.items())
        line = f"{name}{{{wanted}}} " if wanted else f"{name} "
        for each in self.text.splitlines():
            if each.startswith(line):
                return float(each.removeprefix(line))
        raise AssertionError(f"no series {line!r}")


class Served:
    """One ``python -m kvpilot_engine`` and clients of it."""

    def __init__(self, directory: Path, *options: str, generation: int = 3, **config: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / "engine.yaml"
        file.write_text(json.dumps({"generation": generation, "epoch": 1, "config": {**CONFIG, **config}}))
        self._log = directory / "stderr.txt"
        command = [
            sys.executable,
            "-m",
            "kvpilot_engine",
            "--config",
            str(file),
            "--port",
            "0",
            "--admin-port",
        ]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "0", *options], stderr=log, env={**os.environ, "KVPILOT_ADMIN_TOKEN": TOKEN}
            )

    def wait_ready(self) -> Served:
        ports = self.wait_log(r"listening on port (\d+), admin port (\d+)")
        self.url, self.admin_url = (f"http://127.0.0.1:{port}" for port in ports.groups())
        self.wait_log(r"ready: ")
        self.http = httpx.Client(base_url=self.url, timeout=60.0)
        self.admin = httpx.Client(
            base_url=self.admin_url, timeout=60.0, headers={"Authorization": f"Bearer {TOKEN}"}
        )
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        return self

    def wait_log(self, pattern: str) -> re.Match[str]:
        def found() -> re.Match[str] | None:
            match = re.search(pattern, self.log)
            if match is None and self.process.poll() is not None:
                pytest.fail(f"the engine ended with {self.process.returncode}: {self.log}")
            return match

        return eventually(found, READY_S, lambda: f"no {pattern!r} in: {self.log}")

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def core(self) -> psutil.Process:
        return psutil.Process(self.process.pid).children()[0]

    def patch(self, **values: Any) -> dict[str, Any]:
        now = self.admin.get("/admin/config").json()
        body = {"epoch": now["epoch"], "generation": now["generation"] + 1, "values": values}
        answer = self.admin.patch("/admin/config", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def page(self) -> Page:
        """The metrics page now; the core's part of it is at most half a second old."""
        return Page(self.http.get("/metrics").text)

    def metric(self, name: str, **labels: str) -> float:
        """One series of the page of now."""
        return self.page().metric(name, **labels)

    def settle(self) -> None:
        """Wait until no request is left, and the page shows the core after this call."""
        generation = self.patch()["generation"]

        def settled() -> bool:
            page = self.page()
            left = page.metric("kvpilot_requests_running") + page.metric("kvpilot_requests_waiting")
            return page.metric("kvpilot_config_generation") == generation and left == 0

        eventually(settled, why=lambda: "requests are left")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The engine that most tests share; a test that changes its configuration restores it."""
    engine = Served(tmp_path_factory.mktemp("served"), "--drain-lag-seconds", "0").wait_ready()
    yield engine
    assert engine.stop() == 0, engine.log


@dataclass(frozen=True)
class Victims:
    """Engines that tests end, each with room for an answer that outlasts its test.

    Attributes:
        lagging: takes new connections for 300 s after the first signal.
        draining: takes none after it.
        orphan: for the end of its core.
    """

    lagging: Served
    draining: Served
    orphan: Served


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victims]:
    """Started together, since a start takes seconds."""
    engines = [
        Served(
            tmp_path_factory.mktemp("victim"), "--drain-seconds", "600", "--drain-lag-seconds", lag_s,
            maxTokens=65_536, requestTimeoutS=600,
        )
        for lag_s in ("300", "0", "0")
    ]  # fmt: skip
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Served.wait_ready, engines))
        yield Victims(*engines)
    finally:
        for engine in engines:
            engine.process.kill()
            engine.process.wait()
