"""An alert of a real Alertmanager: boost, more replicas, expiry, decay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.cluster import eventually, http

# ruff: noqa: PLR0917 - fixtures are taken by name
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture
def alerting(cluster, namespace, operator) -> Iterator[None]:
    """An alert rule for requests longer than 50 ms, and an Alertmanager route to the operator."""
    rules = Path(cluster.state["prometheus"]["rules_dir"]) / f"{namespace}.yaml"
    config = Path(cluster.state["alertmanager"]["config"])
    before = config.read_text()
    match = f'{{namespace="{namespace}"'
    expression = (
        f'sum by (namespace, kvpilot_name) (rate(kvpilot_request_seconds_bucket{match},le="0.05"}}[5s]))'
        f" < 0.5 * sum by (namespace, kvpilot_name) (rate(kvpilot_request_seconds_count{match}}}[5s]))"
    )
    rule = {"alert": "CriticalLatency", "expr": expression, "labels": {"severity": "critical"}}
    rules.write_text(json.dumps({"groups": [{"name": "e2e", "interval": "1s", "rules": [rule]}]}))
    url = f"http://{cluster.state['host_ip']}:{operator.ports['alerts']}/alerts"
    authorization = {"authorization": {"credentials": (operator.folder / "token").read_text()}}
    receiver = {
        "name": "kvpilot",
        "webhook_configs": [{"url": url, "send_resolved": True, "http_config": authorization}],
    }
    route = {"receiver": "kvpilot", "group_by": ["namespace", "kvpilot_name"], "group_wait": "1s",
             "group_interval": "2s", "repeat_interval": "20s"}  # fmt: skip
    config.write_text(json.dumps({"route": route, "receivers": [receiver]}))
    reload(cluster)
    yield
    rules.unlink()
    config.write_text(before)
    reload(cluster)


def reload(cluster: Any) -> None:
    for name in ("prometheus", "alertmanager"):
        http(f"{cluster.state[name]['url']}/-/reload", data=b"")


def test_alert_boosts_replicas_and_the_boost_decays(
    cluster, namespace, operator, manifest, serve, load, alerting
) -> None:
    limits = {"latency": {"p50Ms": 50}, "throughput": {"target": 0}, "hitRate": "0%"}
    serve(
        manifest(
            scaling={"min": 1, "max": 3},
            objectives=limits,
            config={"numWorkers": 16, "batchSize": 16},
            tuning={"disabledRules": ["replicas-up"]},
        )
    )
    assert cluster.replicas(namespace) == 1
    (alone,) = load.one_at_a_time([pod["status"]["podIP"] for pod in cluster.pods(namespace)], 128)
    # Longer than the limit of the alert on a fast machine, too.
    load.start(rate=2.5 / alone, seconds=600, output_tokens=128)
    override = eventually(lambda: cluster.list("kvco", namespace), 90, "an override")[0]
    assert override["spec"]["target"] == "chat"
    assert override["spec"]["boost"] == {"minReplicas": 2}
    assert override["spec"]["reason"].startswith("alert CriticalLatency")
    eventually(lambda: cluster.replicas(namespace) == 2, 30, "two replicas")
    assert override["metadata"]["name"] in cluster.status(namespace)["overrides"]
    reasons = [event["reason"] for event in cluster.list("event", namespace)]
    assert reasons.count("AlertBoost") == 1
    eventually(
        lambda: operator.metrics("kvpilot_operator_alerts_total").get('{result="boosted"}') == 1,
        10,
        "the operator has counted the notification",
    )
    load.stop()

    eventually(lambda: not cluster.list("kvco", namespace), 120, "resolved, expired and deleted")
    eventually(lambda: cluster.replicas(namespace) == 1, 150, "idle: back to one replica")


def test_notification_without_the_token_is_refused(cluster, namespace, operator) -> None:
    import urllib.error

    with pytest.raises(urllib.error.HTTPError, match="401"):
        http(f"http://127.0.0.1:{operator.ports['alerts']}/alerts", data=b"{}")
    assert operator.metrics("kvpilot_operator_alerts_total")['{result="unauthorized"}'] == 1
