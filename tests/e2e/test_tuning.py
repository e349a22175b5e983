"""A breach under real load, cured by a knob, while no pod restarts and no request fails."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import yaml

# ruff: noqa: PLR0917 - fixtures are taken by name
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.flaky(reruns=1)]

SHORT = 8
"""Tokens of an answer: few, so that even a busy machine serves enough requests to judge by."""

OVERLOAD, MORE, CALM_S = 1.2, 0.4, 12.0
"""First load over what one request at a time serves; what is added while nothing hurts for so long, s."""

EDGES_MS = (50, 100, 150, 200, 250, 300, 400, 500, 750, 1000, 1500, 2000, 3000, 5000, 10000, 30000)


@dataclass
class Pressure:
    """Load that rises until it hurts: what a machine can do differs, also from minute to minute.

    Batching serves several times what one request at a time does, so there is room between both.
    """

    template: Any
    alone: float
    loads: list[Any] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def add(self, factor: float) -> None:
        folder = self.template.folder / f"load-{len(self.loads)}"
        folder.mkdir()
        self.loads.append(replace(self.template, folder=folder))
        self.loads[-1].start(rate=factor * self.alone, seconds=400, output_tokens=SHORT)


@dataclass
class Scene:
    """Two engines with one worker each, under more load than one worker can serve."""

    cluster: Any
    namespace: str
    uids: list[str]
    pressure: Pressure

    def press(self) -> None:
        """Raise the load while it does not hurt, until a change is promoted."""
        self.pressure.add(OVERLOAD)
        hurt_at = time.monotonic()
        while not self.pressure.released.wait(1.0):
            states = {item["name"]: item["state"] for item in self.status.get("objectives", ())}
            if "Breached" in (states.get("p50"), states.get("p95")):
                hurt_at = time.monotonic()
            if any("Promoted" in outcome for outcome in self.outcomes()):
                return
            if time.monotonic() - hurt_at > CALM_S and len(self.pressure.loads) < 6:
                self.pressure.add(MORE)
                hurt_at = time.monotonic()

    @property
    def status(self) -> dict[str, Any]:
        return self.cluster.get("kvcd", "chat", self.namespace).get("status", {})

    def outcomes(self) -> list[str]:
        return [f"{item['rule']}: {item['outcome']}" for item in self.status.get("decisions", ())]

    def generation(self, uid: str) -> float:
        """Of the configuration that an engine runs, as it says itself."""
        rows = self.cluster.prometheus(f'kvpilot_config_generation{{pod_uid="{uid}"}}')
        return float(rows[0]["value"][1])


@pytest.fixture
def scene(cluster, namespace, operator, manifest, serve, load) -> Iterator[Scene]:
    config = {"numWorkers": 1, "batchSize": 16, "maxTokens": 16384, "maxQueue": 10000}
    quiet = {"config": config, "replicas": 2, "cpu": "900m"}
    serve(manifest(tuning={"mode": "Off"}, **quiet))
    alone = load.one_at_a_time([pod["status"]["podIP"] for pod in cluster.pods(namespace)], SHORT)
    edge = next(edge for edge in EDGES_MS if edge >= max(alone) * 2000)
    limits = {
        "latency": {"p50Ms": edge, "p95Ms": EDGES_MS[min(EDGES_MS.index(edge) + 3, 15)]},
        "throughput": {"target": 0},
        "hitRate": "0%",
        "errors": "20%",
    }
    cluster.apply(manifest(objectives=limits, **quiet))
    uids = sorted(pod["metadata"]["uid"] for pod in cluster.pods(namespace))
    made = Scene(cluster, namespace, uids, Pressure(load, sum(1 / seconds for seconds in alone)))
    presses = threading.Thread(target=made.press)
    presses.start()
    yield made
    made.pressure.released.set()
    presses.join()
    for running in made.pressure.loads:
        running.stop()


def test_a_breach_is_cured_by_a_knob_on_a_canary(scene, cluster, namespace, operator, kit) -> None:
    promoted = kit["eventually"](
        lambda: [item for item in scene.status.get("decisions", ()) if item["outcome"] == "Promoted"],
        180,
        "a change is promoted",
    )
    assert promoted[0]["rule"] in {"workers-up", "batch-up"}
    status = kit["eventually"](
        lambda: scene.status if scene.status["config"]["generation"] > 1 else None, 20, "a new generation"
    )
    assert status["config"]["overlay"][0]["knob"] in {"numWorkers", "batchSize"}
    pods = cluster.pods(namespace)
    assert sorted(pod["metadata"]["uid"] for pod in pods) == scene.uids
    assert [s["restartCount"] for pod in pods for s in pod["status"]["containerStatuses"]] == [0, 0]
    failed = cluster.prometheus(
        f'sum(kvpilot_requests_total{{namespace="{namespace}",outcome=~"error|timeout|shed"}})'
    )
    assert float(failed[0]["value"][1]) == 0.0
    reasons = {event["reason"] for event in cluster.list("events.events.k8s.io", namespace)}
    assert {"ChangeStarted", "ChangePromoted"} <= reasons
    assert any(
        'outcome="Promoted"' in labels for labels in operator.metrics("kvpilot_operator_decisions_total")
    )
    told = cluster.get("configmap", "chat-decisions", namespace)["data"]["decisions.jsonl"]
    assert "Promoted" in [json.loads(line)["outcome"] for line in told.splitlines()]


def watch_states(cluster: Any, namespace: str) -> subprocess.Popen[str]:
    """Prints the tuner's state whenever the status is written."""
    return subprocess.Popen(
        [
            cluster.state["kubectl"], f"--kubeconfig={cluster.state['kubeconfig']}", "get", "kvcd", "chat",
            f"--namespace={namespace}", "--watch", "-o=jsonpath={.status.tuning.state}{'\\n'}",
        ],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def kill_within(state: str, scene: Scene, operator: Any) -> None:
    """Kill the operator the moment the status says ``state``: the intent is written, the deed is not done."""
    watch = watch_states(scene.cluster, scene.namespace)
    assert watch.stdout is not None
    deadline, seen = time.monotonic() + 150, []
    try:
        for line in watch.stdout:
            seen.append(line.strip())
            if seen[-1] == state or time.monotonic() > deadline:
                operator.kill()
                break
    finally:
        watch.kill()
        watch.wait()
    assert seen[-1] == state, f"the change never came to {state}: {seen}; {scene.outcomes()}"


def test_an_operator_killed_at_each_step_of_a_change_leaves_a_whole_configuration(
    scene, cluster, namespace, operator, kit
) -> None:
    for state in ("Canary", "Settle", "Verify", "Promote"):
        kill_within(state, scene, operator)
        operator.start()

    def ended() -> bool:
        """Promoted, reverted or aborted: every engine runs the last known good configuration."""
        status = scene.status
        held = yaml.safe_load(cluster.get("configmap", "chat-config", namespace)["data"]["config.yaml"])
        running = {scene.generation(uid) for uid in scene.uids}
        return "change" not in status["tuning"] and running == {float(held["generation"])}

    kit["eventually"](ended, 150, f"the change ends; {scene.outcomes()}")
    assert sorted(pod["metadata"]["uid"] for pod in cluster.pods(namespace)) == scene.uids
    assert any(end in outcome for outcome in scene.outcomes() for end in ("Promoted", "Reverted", "Aborted"))
