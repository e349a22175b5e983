"""The chart: its objects, refused values, and the operator's permissions."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripts.manifests import CHART, REPO, find_helm, kept_keys, main

# Needs Helm and promtool, which `make cluster-up` builds.
pytestmark = pytest.mark.e2e

Render = Callable[..., list[dict[str, Any]]]
Template = Callable[..., subprocess.CompletedProcess[str]]


def of_kind(items: list[dict[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    found = [i for i in items if i["kind"] == kind and (not name or i["metadata"]["name"] == name)]
    assert len(found) == 1, f"{len(found)} {kind} {name}"
    return found[0]


def container(items: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = of_kind(items, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    return found


def test_chart_passes_helm_lint(helm: str) -> None:
    done = subprocess.run(
        [helm, "lint", "--strict", str(CHART)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_one_operator_runs_at_a_time(render: Render) -> None:
    items = render()
    workload = of_kind(items, "Deployment")["spec"]
    assert (workload["replicas"], workload["strategy"]) == (1, {"type": "Recreate"})
    operator = container(items)
    assert operator["image"] == "ghcr.io/kvpilot/operator:0.1.0"
    env = {item["name"]: item.get("value") for item in operator["env"]}
    assert env["KVPILOT_SOURCES_FILE"] == "/etc/kvpilot/sources.yaml"
    assert env["KVPILOT_OPERATOR_KEY_FILE"] == "/etc/kvpilot-keys/operator-key"
    assert env["KVPILOT_ALERTS_TOKEN_FILE"] == "/etc/kvpilot-keys/alerts-token"
    assert (env["KVPILOT_NAMESPACES"], env["KVPILOT_PACE_SCALE"]) == ("", "1")
    assert env["USER"], "Kopf needs the name of the user"
    assert operator["args"] == ["--metrics-port", "8080", "--alerts-port", "8081"]


def test_pod_conforms_to_the_restricted_standard(render: Render) -> None:
    items = render()
    pod = of_kind(items, "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(items)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_operator_may_write_secrets_but_not_read_them(render: Render) -> None:
    rules = of_kind(render(), "ClusterRole", "kvpilot")["rules"]
    verbs = {
        (group, item): set(rule["verbs"])
        for rule in rules
        for group in rule["apiGroups"]
        for item in rule["resources"]
    }
    assert verbs["", "secrets"] == {"create", "patch"}
    assert verbs["kvpilot.io", "kvcachedeployments"] == {"get", "list", "watch"}
    assert verbs["kvpilot.io", "kvcacheoverrides/status"] == {"update"}
    # A scale-in marks the coldest pods, and an outlier is replaced where the resource allows it.
    assert verbs["", "pods"] == {"get", "list", "watch", "patch", "delete"}
    assert verbs["policy", "poddisruptionbudgets"] == {"get", "list", "watch", "create", "patch"}
    assert verbs["events.k8s.io", "events"] == {"create"}
    assert not [key for key, allowed in verbs.items() if "*" in allowed or "*" in key]
    deletes = {key[1] for key, allowed in verbs.items() if "delete" in allowed}
    assert deletes == {"kvcacheoverrides", "pods"}


def test_namespaces_get_a_role_each_and_no_cluster_role(render: Render) -> None:
    items = render("watchNamespaces={team-a,team-b}", "rbac.aggregate=false")
    roles = {i["metadata"]["namespace"]: i for i in items if i["kind"] == "Role"}
    assert set(roles) == {"team-a", "team-b", "kvpilot-system"}
    assert roles["kvpilot-system"]["rules"] == [
        {
            "apiGroups": [""],
            "resources": ["configmaps"],
            "resourceNames": ["kvpilot-tuning"],
            "verbs": ["get"],
        }
    ]
    assert not [i for i in items if i["kind"].startswith("ClusterRole")]
    env = {item["name"]: item.get("value") for item in container(items)["env"]}
    assert env["KVPILOT_NAMESPACES"] == "team-a,team-b"


def test_who_may_edit_may_create_overrides_and_who_may_view_may_read_them(render: Render) -> None:
    def verbs(role: str) -> set[str]:
        rules = of_kind(render(), "ClusterRole", role)["rules"]
        return {verb for rule in rules if "kvcacheoverrides" in rule["resources"] for verb in rule["verbs"]}

    assert verbs("kvpilot-edit") == {"create", "patch", "delete"}
    assert verbs("kvpilot-view") == {"get", "list", "watch"}


def test_definitions_are_installed_kept_or_omitted(render: Render) -> None:
    items = render()
    definition = of_kind(items, "CustomResourceDefinition", "kvcachedeployments.kvpilot.io")
    plain = yaml.safe_load((REPO / "crds" / "kvcachedeployments.yaml").read_text())
    assert definition["spec"] == plain["spec"]
    assert definition["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    items = render("crds.keep=false")
    assert (
        "annotations"
        not in of_kind(items, "CustomResourceDefinition", "kvcacheoverrides.kvpilot.io")["metadata"]
    )
    assert not [i for i in render("crds.install=false") if i["kind"] == "CustomResourceDefinition"]


def test_operator_can_read_the_sources_file(render: Render) -> None:
    data = of_kind(
        render("sources.eu.url=https://p.example.com", "sources.eu.scrapeInterval=5s"), "ConfigMap"
    )
    sources = yaml.safe_load(data["data"]["sources.yaml"])["sources"]
    assert sources["eu"] == {"url": "https://p.example.com", "scrapeInterval": "5s"}
    assert sources["default"]["url"].startswith("http://")


def test_keys_are_generated_or_given_or_in_an_existing_secret(render: Render) -> None:
    keys = of_kind(render(), "Secret")["data"]
    assert len(base64.b64decode(keys["operator-key"])) >= 32
    assert keys["operator-key"] != of_kind(render(), "Secret")["data"]["operator-key"]
    given = of_kind(render(f"secret.alertsToken={'t' * 20}"), "Secret")["data"]
    assert base64.b64decode(given["alerts-token"]) == b"t" * 20
    items = render("secret.existingSecret=mine")
    assert not [i for i in items if i["kind"] == "Secret"]
    volumes = of_kind(items, "Deployment")["spec"]["template"]["spec"]["volumes"]
    assert {"name": "keys", "secret": {"secretName": "mine"}} in volumes


@pytest.mark.parametrize(
    ("value", "reported"),
    [
        ("foo=1", "additional properties 'foo' not allowed"),
        ("image.tagg=1", "additional properties 'tagg' not allowed"),
        ("podMonitor.enable=true", "additional properties 'enable' not allowed"),
        ("sources.eu.urll=x", "additional properties 'urll' not allowed"),
        ("sources.default.url=prometheus:9090", "does not match pattern"),
        ("sources.default.scrapeInterval=0s", "scrapeInterval"),
        ("sources.default.scrapeInterval=0.0m", "scrapeInterval"),
        ("sources.default.scrapeInterval=700s", "scrapeInterval"),
        ("sources.default.scrapeInterval=11m", "scrapeInterval"),
        ("paceScale=fast", "paceScale"),
        ("paceScale=0", "paceScale"),
        ("paceScale=0.001", "paceScale"),
        ("paceScale=12.5", "paceScale"),
        ("fullnameOverride=my.kvpilot", "fullnameOverride"),
        ("nameOverride=kv.pilot", "nameOverride"),
        ("service.metricsPort=0", "minimum"),
        ("secret.operatorKey=short", "does not match pattern"),
    ],
)
def test_unknown_keys_and_bad_values_are_refused(template: Template, value: str, reported: str) -> None:
    done = template(value)
    assert done.returncode != 0
    assert reported in done.stderr


@pytest.mark.parametrize(
    "value",
    [
        "paceScale=0.05",
        "paceScale=10",
        "fullnameOverride=my-kvpilot",
        *(
            f"sources.default.scrapeInterval={each}"
            for each in ("500ms", "0.5s", "15s", "600s", "1.5m", "10m")
        ),
    ],
)
def test_values_that_the_operator_accepts_are_valid(template: Template, value: str) -> None:
    assert template(value).returncode == 0


def test_every_object_of_the_schema_is_closed_or_open_on_purpose() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(schema["properties"]) - {"global"} == set(values), "each value has a schema and a default"
    open_ones = [
        name
        for name, node in schema["properties"].items()
        if node.get("type") == "object" and "additionalProperties" not in node
    ]
    assert open_ones == ["global", "affinity", "podSecurityContext", "securityContext"]


def test_monitors_add_the_labels_that_the_operator_queries(render: Render) -> None:
    assert not [i for i in render() if i["kind"] in {"PodMonitor", "PrometheusRule"}]
    items = render("podMonitor.enabled=true", "podMonitor.interval=5s", "podMonitor.additionalLabels.team=a")
    engines = of_kind(items, "PodMonitor", "kvpilot-engines")
    assert engines["metadata"]["labels"]["team"] == "a"
    (endpoint,) = engines["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["interval"]) == ("http", "5s")
    assert {r["targetLabel"] for r in endpoint["relabelings"]} == {"pod_uid", "kvpilot_name", "component"}
    assert engines["spec"]["namespaceSelector"] == {"any": True}


def test_the_kill_switch_reaches_the_operator(render: Render) -> None:
    def env(*values: str) -> dict[str, str]:
        given = container(render(*values))["env"]
        return {item["name"]: item["value"] for item in given if item["name"].startswith("KVPILOT_TUNING")}

    watched = {"KVPILOT_TUNING_CONFIGMAP": "kvpilot-system/kvpilot-tuning"}
    assert env() == {"KVPILOT_TUNING": "on", **watched}
    assert env("tuning=off") == {"KVPILOT_TUNING": "off", **watched}


def test_every_alert_has_an_existing_runbook(render: Render) -> None:
    rule = of_kind(render("prometheusRule.enabled=true"), "PrometheusRule")
    alerts = [item for group in rule["spec"]["groups"] for item in group["rules"]]
    assert {item["alert"] for item in alerts} >= {
        "SystemDown",
        "CriticalLatency",
        "HighErrorRate",
        "LowCacheHitRate",
        "HighMemoryUsage",
        "LowThroughput",
        "ThroughputBelowFloor",
        "HighLoadRequiresScaling",
        "LowUtilizationScaleDown",
    }
    runbook = (REPO / "docs" / "runbooks" / "alerts.md").read_text()
    for item in alerts:
        url, _, anchor = item["annotations"]["runbook_url"].partition("#")
        assert url.endswith("docs/runbooks/alerts.md")
        assert anchor == item["alert"].lower()
        assert f"\n## {item['alert']}\n" in runbook


def test_promtool_accepts_the_rules() -> None:
    helm = find_helm()
    beside = sorted(Path(helm).parents[1].glob("prometheus-*/promtool")) if helm else []
    promtool = shutil.which("promtool") or (str(beside[-1]) if beside else None)
    if promtool is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no promtool: `make programs` builds it")
        pytest.skip("no promtool: `make programs` builds it")
    tests = Path(__file__).parent / "alerts_test.yaml"
    for command in (["check", "rules", str(CHART / "files" / "alerts.yaml")], ["test", "rules", str(tests)]):
        done = subprocess.run([promtool, *command], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_manifest_file_keeps_its_keys(helm: str, tmp_path: Path) -> None:
    file = tmp_path / "dist" / "install.yaml"
    assert main(["--output", str(file), "--namespace", "ops"]) == 0
    first = [item for item in yaml.safe_load_all(file.read_text()) if item]
    assert first[0] == {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ops"}}
    assert not [i for i in first if "helm.sh/hook" in (i["metadata"].get("annotations") or {})]
    assert file.stat().st_mode & 0o077 == 0, "it contains keys"
    assert main(["--output", str(file), "--namespace", "ops", "--set", "image.tag=next"]) == 0
    second = [item for item in yaml.safe_load_all(file.read_text()) if item]
    assert of_kind(second, "Secret")["data"] == of_kind(first, "Secret")["data"]
    assert container(second)["image"].endswith(":next")
    assert kept_keys(tmp_path / "none.yaml") == []


def test_invalid_value_of_the_manifest_file_exits_2(
    helm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path / "x.yaml"), "--set", "foo=1"]) == 2
    assert "additional properties 'foo' not allowed" in capsys.readouterr().err
    assert not (tmp_path / "x.yaml").exists()
