"""GPU resources and everything around them reach the pod as the user wrote them."""

from __future__ import annotations

from pathlib import Path

from kvpilot_operator.manifests import owned_objects
from kvpilot_operator.manifests.names import NAME_LABEL
from kvpilot_operator.resource import KVCacheDeployment, load_manifest

EXAMPLE = Path(__file__).parents[3] / "examples" / "gpu.yaml"


def test_the_gpu_example_asks_for_its_gpu() -> None:
    *_, workload = owned_objects(load_manifest(EXAMPLE), "token")
    pod = workload["spec"]["template"]["spec"]
    (engine,) = pod["containers"]
    assert engine["resources"]["limits"] == {"nvidia.com/gpu": "1", "memory": "64Gi"}
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H200"}
    assert engine["image"].startswith("ghcr.io/kvpilot/engine:")
    assert engine["args"][:2] == ["--model", "/models/qwen3-0.6b"]
    assert workload["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_selector_labels_and_digest_cannot_be_overridden() -> None:
    plain = load_manifest(EXAMPLE)
    labels = {NAME_LABEL: "other", "app.kubernetes.io/part-of": "shop", "team": "a"}
    annotations = {"kvpilot.io/cold-hash": "none", "sidecar.istio.io/inject": "false"}
    given = {"metadata": {"labels": labels, "annotations": annotations}}
    document = {
        "apiVersion": plain.api_version,
        "kind": plain.kind,
        "metadata": {"name": "chat"},
        "spec": {"replicas": 1, "template": given},
    }
    *_, workload = owned_objects(KVCacheDeployment.parse(document), "token")
    metadata = workload["spec"]["template"]["metadata"]
    assert metadata["labels"][NAME_LABEL] == "chat"
    assert metadata["labels"]["app.kubernetes.io/part-of"] == "kvpilot", "or nobody would measure it"
    assert metadata["labels"]["team"] == "a"
    assert metadata["annotations"]["kvpilot.io/cold-hash"] != "none"
    assert metadata["annotations"]["sidecar.istio.io/inject"] == "false"
