"""Prometheus and Alertmanager as processes next to the control plane."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.cluster.layout import Layout

PART_OF = "kvpilot"


def prometheus_config(kubeconfig: Path, rules: Path) -> str:
    """Prometheus' configuration as JSON, a subset of YAML; it discovers kvpilot's pods by their labels.

    Each second it scrapes the container port `http` of engine pods and `metrics` of operator pods. Every
    sample has the labels namespace, pod, pod_uid, kvpilot_name and component.
    """
    pod, label = "__meta_kubernetes_pod", "__meta_kubernetes_pod_label"
    component = f"{label}_app_kubernetes_io_component"
    copied = {
        "namespace": "__meta_kubernetes_namespace",
        "pod": f"{pod}_name",
        "pod_uid": f"{pod}_uid",
        "kvpilot_name": f"{label}_kvpilot_io_name",
        "component": component,
    }
    keep = [
        {"action": "keep", "source_labels": [f"{pod}_phase"], "regex": "Running"},
        {
            "action": "keep",
            "source_labels": [component, f"{pod}_container_port_name"],
            "regex": "engine;http|operator;metrics",
        },
    ]
    discovery = {
        "role": "pod",
        "kubeconfig_file": str(kubeconfig),
        "selectors": [{"role": "pod", "label": f"app.kubernetes.io/part-of={PART_OF}"}],
    }
    return json.dumps(
        {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules / "*.yaml")],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": ["127.0.0.1:9093"]}]}]},
            "scrape_configs": [
                {
                    "job_name": PART_OF,
                    "kubernetes_sd_configs": [discovery],
                    "relabel_configs": [
                        *keep,
                        *({"source_labels": [source], "target_label": to} for to, source in copied.items()),
                    ],
                }
            ],
        },
        indent=1,
    )


def alertmanager_config() -> str:
    """Alertmanager's first configuration, without receivers. Tests rewrite the file and reload."""
    route = {"receiver": "nobody", "group_wait": "1s", "group_interval": "5s", "repeat_interval": "1m"}
    return json.dumps({"route": route, "receivers": [{"name": "nobody"}]}, indent=1)


def prometheus(layout: Layout, kubeconfig: Path) -> list[str]:
    """Write Prometheus' files; return its arguments, which allow POST /-/reload."""
    layout.rules.mkdir(parents=True, exist_ok=True)
    layout.prometheus_file.write_text(prometheus_config(kubeconfig, layout.rules))
    return [
        f"--config.file={layout.prometheus_file}",
        f"--storage.tsdb.path={layout.monitoring / 'prometheus'}",
        "--web.listen-address=0.0.0.0:9090",
        "--web.enable-lifecycle",
    ]


def alertmanager(layout: Layout) -> list[str]:
    """Write Alertmanager's files; return its arguments, which switch clustering off."""
    layout.monitoring.mkdir(parents=True, exist_ok=True)
    layout.alertmanager_file.write_text(alertmanager_config())
    return [
        f"--config.file={layout.alertmanager_file}",
        f"--storage.path={layout.monitoring / 'alertmanager'}",
        "--web.listen-address=0.0.0.0:9093",
        "--cluster.listen-address=",
    ]
