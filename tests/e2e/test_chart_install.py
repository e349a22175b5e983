"""The chart on a real control plane: install, upgrade and uninstall with running replicas; kubectl apply."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from scripts.cluster.layout import REPO
from tests.e2e.cluster import eventually

# ruff: noqa: PLR0917 - fixtures are taken by name
# Alone: these tests add and remove definitions, and their operators watch all namespaces.
pytestmark = [pytest.mark.e2e, pytest.mark.alone, pytest.mark.timeout(750)]


@pytest.fixture(scope="module")
def definitions(cluster) -> None:
    """No definitions: the chart installs them, and Helm does not adopt existing ones."""
    cluster.kubectl("delete", "--ignore-not-found", "--wait=true", "--timeout=60s", "-f", str(REPO / "crds"))


@pytest.fixture
def release(cluster, definitions, release) -> Iterator[Any]:
    """Also removes cluster-wide objects and those that the chart keeps on purpose."""
    yield release
    cluster.kubectl("delete", "clusterrole,clusterrolebinding", "-l=app.kubernetes.io/instance=kvpilot")
    cluster.kubectl("delete", "--ignore-not-found", "--timeout=60s", "-f", str(REPO / "crds"))


def test_install_upgrade_and_uninstall_with_a_running_resource(
    cluster, namespace, release, manifest, serve
) -> None:
    release.install()
    release.helm("test", "kvpilot", "--timeout=60s")
    serve(manifest(scaling={"min": 1, "max": 2}))
    running = cluster.engines(namespace)
    assert [restarts for _, restarts in running] == [0]
    before = {pod["metadata"]["uid"] for pod in release.pods()}

    release.upgrade("--set-string=podAnnotations.upgraded=yes")
    after = {pod["metadata"]["uid"] for pod in release.pods()}
    assert not before & after, "the operator was replaced"
    cluster.kubectl(
        "patch", "kvcd", "chat", f"--namespace={namespace}", "--type=merge",
        '--patch={"spec":{"engine":{"config":{"numWorkers":6}}}}',
    )  # fmt: skip
    uid = running[0][0]
    eventually(
        lambda: [
            row["value"][1] for row in cluster.prometheus(f'kvpilot_config_generation{{pod_uid="{uid}"}}')
        ] == ["2"],
        90,
        "the new operator applies the new base configuration hot",
    )  # fmt: skip
    assert cluster.engines(namespace) == running

    release.uninstall()
    eventually(lambda: not release.pods(), 20, "the operator ends within its grace period")
    assert cluster.engines(namespace) == running
    assert cluster.get("kvcd", "chat", namespace)["metadata"]["name"] == "chat", "definitions are kept"
    cluster.kubectl("delete", "kvcd", "chat", f"--namespace={namespace}", "--timeout=20s")
    eventually(lambda: not cluster.pods(namespace), 60, "deletion needs no operator")


def test_operator_waits_for_the_definitions(cluster, namespace, operator, manifest) -> None:
    def reported() -> list[dict[str, Any]]:
        return [line for line in operator.lines() if line.get("event") == "definitions_missing"]

    (line,) = eventually(reported, 20, "the log names the missing definitions")
    assert line["missing"] == ["KVCacheDeployment", "KVCacheOverride"]
    try:
        cluster.kubectl("apply", "--server-side", "-f", str(REPO / "crds"))
        cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(REPO / "crds"))
        cluster.apply(manifest(scaling={"min": 1, "max": 1}, nowhere=True))
        eventually(lambda: cluster.pods(namespace), 30, "an engine pod is asked for")
        assert len(reported()) == 1
    finally:
        cluster.kubectl("delete", "--ignore-not-found", "--timeout=60s", "-f", str(REPO / "crds"))


def test_kubectl_apply_installs_the_operator(
    cluster, definitions, chart_values, namespace, manifest, tmp_path
) -> None:
    values, install = tmp_path / "values.yaml", tmp_path / "install.yaml"
    values.write_text(yaml.safe_dump(chart_values))
    home = f"kvpilot-{uuid.uuid4().hex[:6]}"
    subprocess.run(
        [sys.executable, "-m", "scripts.manifests", f"--namespace={home}", f"--values={values}",
         f"--output={install}"],
        cwd=REPO, check=True, timeout=60,
    )  # fmt: skip
    try:
        cluster.kubectl("apply", "--server-side", "-f", str(install))
        cluster.kubectl("rollout", "status", "deployment/kvpilot", f"--namespace={home}", "--timeout=120s")
        cluster.apply(manifest(scaling={"min": 1, "max": 1}, nowhere=True))
        eventually(lambda: cluster.pods(namespace), 60, "an engine pod is asked for")
    finally:
        cluster.kubectl("delete", "--ignore-not-found", "--timeout=90s", "-f", str(install), check=False)
