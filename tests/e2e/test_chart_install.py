"""The chart on a real control plane: install, upgrade, uninstall beside engines that run; kubectl alone."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

# ruff: noqa: PLR0917 - fixtures are taken by name
# Alone: definitions come and go, and the operator serves all namespaces.
pytestmark = [pytest.mark.e2e, pytest.mark.alone, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "kvpilot"


@pytest.fixture(scope="module")
def definitions(cluster) -> None:
    """None of ours: the chart brings them, and Helm adopts none that others applied."""
    cluster.kubectl("delete", "--ignore-not-found", "--wait=true", "--timeout=60s", "-f", str(ROOT / "crds"))


@dataclass
class Release:
    """The operator by Helm in a namespace of its own."""

    cluster: Any
    namespace: str
    values: Path

    def helm(self, *arguments: str) -> str:
        state = self.cluster.state
        command = [
            state["helm"],
            f"--kubeconfig={state['kubeconfig']}",
            f"--namespace={self.namespace}",
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
        assert done.returncode == 0, f"helm {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def install(self) -> None:
        self.helm("install", "kvpilot", str(CHART), f"--values={self.values}", "--wait", "--timeout=120s")

    def upgrade(self, *arguments: str) -> None:
        self.helm(
            "upgrade",
            "kvpilot",
            str(CHART),
            f"--values={self.values}",
            "--wait",
            "--timeout=120s",
            *arguments,
        )

    def uninstall(self) -> None:
        self.helm("uninstall", "kvpilot", "--wait", "--timeout=60s")

    def pods(self) -> list[dict[str, Any]]:
        selector = "app.kubernetes.io/component=operator"
        return list(self.cluster.list("pods", self.namespace, selector))


def chart_values(cluster: Any) -> dict[str, Any]:
    """The operator's image as it was built for the cluster, and Prometheus as pods reach it."""
    repository, _, tag = cluster.state["images"]["operator"].rpartition(":")
    return {
        "image": {"repository": repository, "tag": tag, "pullPolicy": "Never"},
        "sources": {"default": {"url": cluster.state["prometheus"]["url"], "scrapeInterval": "1s"}},
        "paceScale": 0.4,
    }


@pytest.fixture
def release(cluster, definitions, tmp_path) -> Iterator[Release]:
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(chart_values(cluster)))
    made = Release(cluster, f"kvpilot-{uuid.uuid4().hex[:6]}", values)
    cluster.kubectl("create", "namespace", made.namespace)
    yield made
    told = cluster.kubectl("describe", "pods", f"--namespace={made.namespace}", check=False)
    (tmp_path / "operator.txt").write_text(told)
    for pod in made.pods():
        log = cluster.kubectl("logs", f"--namespace={made.namespace}", pod["metadata"]["name"], check=False)
        (tmp_path / f"{pod['metadata']['name']}.log").write_text(log)
    cluster.kubectl("delete", "namespace", made.namespace, "--timeout=60s")
    # What is not in the namespace, and what the chart keeps on purpose.
    cluster.kubectl("delete", "clusterrole,clusterrolebinding", "-l=app.kubernetes.io/instance=kvpilot")
    cluster.kubectl("delete", "--ignore-not-found", "--timeout=60s", "-f", str(ROOT / "crds"))


def engines(cluster: Any, namespace: str) -> list[tuple[str, int]]:
    """UIDs and restarts of the engine pods."""
    return sorted(
        (pod["metadata"]["uid"], sum(s["restartCount"] for s in pod["status"]["containerStatuses"]))
        for pod in cluster.pods(namespace)
    )


def test_install_upgrade_and_uninstall_beside_a_running_deployment(
    cluster, namespace, release, manifest, serve, kit
) -> None:
    release.install()
    release.helm("test", "kvpilot", "--timeout=60s")
    serve(manifest(scaling={"min": 1, "max": 2}))
    running = engines(cluster, namespace)
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
    kit["eventually"](
        lambda: [
            row["value"][1] for row in cluster.prometheus(f'kvpilot_config_generation{{pod_uid="{uid}"}}')
        ] == ["2"],
        90,
        "the new operator pushes the new base, hot",
    )  # fmt: skip
    assert engines(cluster, namespace) == running

    release.uninstall()
    kit["eventually"](lambda: not release.pods(), 20, "the operator ends at once, within its grace")
    assert engines(cluster, namespace) == running
    assert cluster.get("kvcd", "chat", namespace)["metadata"]["name"] == "chat", "definitions are kept"
    cluster.kubectl("delete", "kvcd", "chat", f"--namespace={namespace}", "--timeout=20s")
    kit["eventually"](lambda: not cluster.pods(namespace), 60, "nothing is stuck without an operator")


def test_an_operator_pod_killed_within_a_canary_leaves_a_whole_configuration(
    cluster, namespace, release, overload, kit
) -> None:
    release.install()
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
    kit["eventually"](scene.ended, 150, f"the next operator ends the change; {scene.outcomes()}")
    (next_pod,) = release.pods()
    assert next_pod["metadata"]["uid"] != pod["metadata"]["uid"]
    assert any(end in outcome for outcome in scene.outcomes() for end in ("Promoted", "Reverted", "Aborted"))
    assert [uid for uid, _ in engines(cluster, namespace)] == scene.uids
    assert [restarts for _, restarts in engines(cluster, namespace)] == [0, 0]
    assert scene.users.failures == []


def test_an_operator_that_comes_before_the_definitions_waits_for_them(
    cluster, namespace, operator, manifest, kit
) -> None:
    def told() -> list[dict[str, Any]]:
        return [line for line in operator.lines() if line.get("event") == "definitions_missing"]

    (line,) = kit["eventually"](told, 20, "it says what is missing")
    assert line["missing"] == ["KVCacheDeployment", "KVCacheOverride"]
    try:
        cluster.kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
        cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(ROOT / "crds"))
        cluster.apply(manifest(scaling={"min": 1, "max": 1}, nowhere=True))
        kit["eventually"](lambda: cluster.pods(namespace), 30, "an engine pod is asked for")
        assert len(told()) == 1
    finally:
        cluster.kubectl("delete", "--ignore-not-found", "--timeout=60s", "-f", str(ROOT / "crds"))


def test_kubectl_apply_alone_installs_it(cluster, definitions, namespace, manifest, kit, tmp_path) -> None:
    values, install = tmp_path / "values.yaml", tmp_path / "install.yaml"
    values.write_text(yaml.safe_dump(chart_values(cluster)))
    home = f"kvpilot-{uuid.uuid4().hex[:6]}"
    subprocess.run(
        [sys.executable, "-m", "scripts.manifests", f"--namespace={home}", f"--values={values}",
         f"--output={install}"],
        cwd=ROOT, check=True, timeout=60,
    )  # fmt: skip
    try:
        cluster.kubectl("apply", "--server-side", "-f", str(install))
        cluster.kubectl("rollout", "status", "deployment/kvpilot", f"--namespace={home}", "--timeout=120s")
        cluster.apply(manifest(scaling={"min": 1, "max": 1}, nowhere=True))
        kit["eventually"](lambda: cluster.pods(namespace), 60, "an engine pod is asked for")
    finally:
        cluster.kubectl("delete", "--ignore-not-found", "--timeout=90s", "-f", str(install), check=False)
