"""Load on engine pods: open loop, closed loop, and the scene in which a knob cures a breach."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tests.e2e.cluster import CROWDED, Cluster, http

from kvpilot_operator.resource.fields import EDGES_MS

JSON = {"Content-Type": "application/json"}


def limit_ms(least_s: float) -> int:
    """The lowest limit of a latency objective that is at least so many seconds."""
    return next(edge for edge in EDGES_MS if edge >= 1000 * least_s)


def complete(url: str, prompt: str, output_tokens: int) -> float:
    """Seconds of one completion by an engine."""
    body = {"model": "builtin/tiny-llama", "prompt": prompt, "max_tokens": output_tokens}
    started = time.monotonic()
    http(f"{url}/v1/completions", json.dumps(body).encode(), JSON, timeout_s=120)
    return time.monotonic() - started


@dataclass
class Load:
    """`kvpilot load` as a process."""

    url: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    def one_at_a_time(self, hosts: Collection[str], output_tokens: int = 16) -> list[float]:
        """Mean seconds per request of each engine, with one request at a time in every engine."""

        def ask(host: str) -> float:
            times = [
                complete(
                    f"http://{host}:8000", f"{host}, {number}: " + f"how is {number}? " * 6, output_tokens
                )
                for number in range(10)
            ]
            return sum(times[2:]) / len(times[2:])

        with ThreadPoolExecutor(len(hosts)) as pool:
            return list(pool.map(ask, hosts))

    def start(self, rate: float, seconds: float, output_tokens: int) -> None:
        command = [
            str(Path(sys.executable).parent / "kvpilot"), "load", self.url, f"--rate={rate}",
            f"--duration={seconds}", f"--output-tokens={output_tokens}", "--user-tokens=16", "--turns=2",
            "--system-tokens=64", "--think=0.5",
        ]  # fmt: skip
        with (self.folder / "load.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)


@dataclass
class Users:
    """A closed loop: users who send the next request as soon as they have their answer.

    The number of users determines the length of queues, whatever the speed of the machine. So the load always
    breaches the objective, is always curable, and is the same for both arms of a comparison.
    """

    url: str
    number: int
    output_tokens: int
    failures: list[str] = field(default_factory=list)
    _leaving: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(self.number)]
        for thread in self._threads:
            thread.start()

    def _ask(self, user: int) -> None:
        for number in itertools.count():
            if self._leaving.is_set():
                return
            try:
                complete(self.url, f"User {user} asks for the {number}th time. " * 3, self.output_tokens)
            except OSError as error:
                self.failures.append(f"user {user}, request {number}: {error}")

    def stop(self) -> None:
        self._leaving.set()
        for thread in self._threads:
            thread.join()


@dataclass
class Scene:
    """Two replicas with one worker slot each, and more users than they can serve within the objective."""

    cluster: Cluster
    namespace: str
    uids: list[str]
    users: Users

    @property
    def status(self) -> dict[str, Any]:
        return self.cluster.status(self.namespace)

    def outcomes(self) -> list[str]:
        return [f"{item['rule']}: {item['outcome']}" for item in self.status.get("decisions", ())]

    def generation(self, uid: str) -> float:
        """Generation of the configuration that an engine reports."""
        rows = self.cluster.prometheus(f'kvpilot_config_generation{{pod_uid="{uid}"}}')
        return float(rows[0]["value"][1])

    def wait_for(self, state: str) -> None:
        """Watch the status until the tuner is in that state."""
        watch = subprocess.Popen(
            self.cluster.command(
                "get", "kvcd", "chat", f"--namespace={self.namespace}", "--watch",
                "-o=jsonpath={.status.tuning.state}{'\\n'}",
            ),
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        too_late = threading.Timer(CROWDED * 150, watch.kill)
        too_late.start()
        assert watch.stdout is not None
        seen = []
        for line in watch.stdout:
            seen.append(line.strip())
            if seen[-1] == state:
                break
        too_late.cancel()
        watch.kill()
        watch.wait()
        assert seen[-1:] == [state], f"the change never came to {state}: {seen}; {self.outcomes()}"

    def ended(self) -> bool:
        """True if no change is in flight and every engine runs the last known good configuration."""
        held = yaml.safe_load(
            self.cluster.get("configmap", "chat-config", self.namespace)["data"]["config.yaml"]
        )
        running = {self.generation(uid) for uid in self.uids}
        return "change" not in self.status["tuning"] and running == {float(held["generation"])}
