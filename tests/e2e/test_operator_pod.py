"""The operator as a pod, installed by the chart for one namespace and killed during a change."""

from __future__ import annotations

import pytest
from tests.e2e.cluster import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(750)]


def test_operator_pod_killed_during_a_canary_leaves_a_consistent_configuration(
    cluster, namespace, release, overload
) -> None:
    release.install(
        "--set=crds.install=false", "--set=rbac.aggregate=false", f"--set=watchNamespaces={{{namespace}}}"
    )
    scene = overload()
    scene.wait_for("Verify")
    (pod,) = release.pods()
    cluster.kubectl(
        "delete",
        "pod",
        pod["metadata"]["name"],
        f"--namespace={release.namespace}",
        "--grace-period=0",
        "--force",
    )
    eventually(scene.ended, 150, f"the next operator ends the change; {scene.outcomes()}")
    (next_pod,) = release.pods()
    assert next_pod["metadata"]["uid"] != pod["metadata"]["uid"]
    assert any(end in outcome for outcome in scene.outcomes() for end in ("Promoted", "Reverted", "Aborted"))
    assert [uid for uid, _ in cluster.engines(namespace)] == scene.uids
    assert [restarts for _, restarts in cluster.engines(namespace)] == [0, 0]
    assert scene.users.failures == []
