"""Overrides written by the commands, against the real API server and a running operator."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from tests.e2e.cluster import condition, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(480)]


def in_force(cluster: Any, namespace: str, name: str) -> str:
    """Reason of the condition InForce of an override; "" before it has one."""
    return str(condition(cluster.get("kvco", name, namespace), "InForce").get("reason", ""))


def test_pause_and_boost_and_pin_by_command(cluster, namespace, operator, manifest, kvpilot) -> None:
    cluster.apply(manifest(scaling={"min": 1, "max": 3}, nowhere=True))
    eventually(lambda: cluster.replicas(namespace) == 1, 30, "one replica")

    pause = json.loads(kvpilot("pause", "chat", "--for", "10m", "--reason", "test", "-o", "json").stdout)
    paused = eventually(
        lambda: condition(cluster.get("kvcd", "chat", namespace), "Paused").get("status") == "True",
        20,
        "the resource says that it is paused",
    )
    assert paused
    item = cluster.get("kvco", pause["name"], namespace)
    assert item["spec"]["by"], "the API server knows who asked"
    eventually(lambda: in_force(cluster, namespace, pause["name"]) == "InForce", 30, "a verdict")

    # A pause of tuning leaves boosts alone.
    boost = json.loads(kvpilot("boost", "chat", "3", "--for", "10m", "-o", "json").stdout)
    eventually(lambda: cluster.replicas(namespace) == 3, 30, "three replicas, although tuning is paused")
    assert boost["name"] in cluster.status(namespace)["overrides"]

    pin = json.loads(kvpilot("pin", "chat", "numWorkers", "8", "-o", "json").stdout)
    held = cluster.get("kvco", pin["name"], namespace)["spec"]["pin"]
    assert held == {"knob": "numWorkers", "value": 8}, "the API server keeps the type of the value"
    refused = kvpilot("pin", "chat", "numWorkers", "16", fails=2)
    assert refused.stderr.startswith(f"kvpilot pin: contradicts {pin['name']}")

    shown = kvpilot("status", "chat").stdout
    assert all(one["name"] in shown for one in (pause, boost, pin))
    assert kvpilot("resume", "chat").stdout.startswith(f"chat in {namespace}: the pause")
    assert kvpilot("unpin", "chat", "numWorkers").stdout.count("is ended") == 1
    eventually(
        lambda: condition(cluster.get("kvcd", "chat", namespace), "Paused").get("status") == "False",
        20,
        "the resource goes on",
    )


def test_values_of_every_kind_pass_the_definition(cluster, namespace, manifest, kvpilot) -> None:
    cluster.apply(manifest(scaling={"min": 1, "max": 3}, nowhere=True))
    pins = {"compressionRatio": 0.5, "enablePrefetch": False, "cacheStrategy": "lfu", "maxTokens": 2048}
    for knob, value in pins.items():
        kvpilot("pin", "chat", knob, json.dumps(value) if not isinstance(value, str) else value)
    found = {
        item["spec"]["pin"]["knob"]: item["spec"]["pin"]["value"] for item in cluster.list("kvco", namespace)
    }
    assert found == pins


def override(namespace: str, name: str, target: str = "chat", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "kvpilot.io/v1alpha1", "kind": "KVCacheOverride",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"target": target, "ttl": "10m", **spec},
    }  # fmt: skip


def test_override_that_is_not_obeyed_is_shown(cluster, namespace, operator, manifest) -> None:
    cluster.apply(
        manifest(scaling={"min": 1, "max": 2}, nowhere=True),
        override(namespace, "lost", target="chta", pause={}),
        override(namespace, "much", boost={"minReplicas": 9}),
        override(namespace, "wrong", pin={"knob": "numWorkers", "value": 500}),
        override(namespace, "late", rollback={"to": 99}),
    )
    eventually(lambda: cluster.replicas(namespace) == 2, 40, "the boost, as far as the maximum")
    for name, reason in (
        ("lost", "NoSuchTarget"),
        ("much", "AboveMaximum"),
        ("wrong", "Invalid"),
        ("late", "NoSuchGeneration"),
    ):
        eventually(
            lambda name=name, reason=reason: in_force(cluster, namespace, name) == reason,
            30,
            f"{name}: {reason}",
        )
    obeyed = condition(cluster.get("kvcd", "chat", namespace), "OverridesObeyed")
    assert obeyed["status"] == "False"
    assert all(f"{name}: " in obeyed["message"] for name in ("much", "wrong", "late"))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"pause": {}, "boost": {"minReplicas": 2}}, "exactly one of pause, approve, pin, boost, rollback"),
        ({}, "exactly one of pause, approve, pin, boost, rollback"),
        ({"pin": {"knob": "useQuantization", "value": True}}, "Unsupported value"),
        ({"pin": {"knob": "numWorkers"}}, "spec.pin.value: Required value"),
        ({"approve": {"decision": "42"}}, "spec.approve.decision"),
        ({"pause": {}, "expiresAt": "2099-01-01T00:00:00Z"}, "exactly one of ttl and expiresAt"),
    ],
)
def test_definition_refuses_what_makes_no_sense(cluster, namespace, spec, words) -> None:
    document = override(namespace, "wrong", **spec)
    done = subprocess.run(
        cluster.command("create", "-f", "-"),
        input=json.dumps(document), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    assert words in done.stderr
