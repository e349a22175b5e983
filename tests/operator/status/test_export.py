"""`kvpilot export --as-spec`: a manifest that a person would write, with what was tuned."""

from __future__ import annotations

from typing import Any

import yaml

from kvpilot_operator.resource import KVCacheDeployment
from kvpilot_operator.status.export import Export, as_spec
from kvpilot_operator.status.history import history_of
from kvpilot_operator.status.model import Status

APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


def exported(overlay: list[dict[str, Any]], config: dict[str, Any]) -> Export:
    manifest = {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheDeployment",
        "metadata": {
            "name": "chat",
            "namespace": "team-a",
            "labels": {"team": "a"},
            "annotations": {APPLIED: "{}", "note": "config:\n  numWorkers: here"},
            "uid": "u",
            "resourceVersion": "7",
            "generation": 3,
            "managedFields": [],
        },
        "spec": {
            "scaling": {"min": 1, "max": 4},
            "engine": {"config": config},
            "tuning": {"knobs": [{"name": "numWorkers", "min": 2}]},
        },
        "status": {"config": {"overlay": overlay}},
    }
    status = Status.model_validate(manifest["status"])
    record = {"id": "d-0003", "at": 1.0, "outcome": "Promoted", "summary": "Requests\nwaited; p95 met."}
    return as_spec(manifest, status, history_of(status, [record]))


def tuned(knob: str, based_on: str, value: str, decision: str = "d-0003") -> dict[str, str]:
    return {"knob": knob, "basedOn": based_on, "value": value, "decision": decision}


def test_tuned_values_are_in_the_spec_and_name_their_decision() -> None:
    overlay = [
        tuned("numWorkers", "8", "16"),
        tuned("enablePrefetch", "null", "false", "d-0002"),
        tuned("cacheStrategy", "lru", "lfu", "d-0001"),
    ]
    made = exported(overlay, {"numWorkers": 8, "maxTokens": 4096, "cacheStrategy": "lru"})
    text = made.text()
    assert yaml.safe_load(text) == made.manifest
    assert KVCacheDeployment.parse(made.manifest).spec.engine.config.num_workers == 16
    assert "      numWorkers: 16  # d-0003: Requests waited; p95 met.\n" in text
    assert "      enablePrefetch: false  # d-0002, was unset\n" in text
    assert "      cacheStrategy: lfu  # d-0001, was lru\n" in text
    assert "      maxTokens: 4096\n" in text
    assert text.count("#") == 3, "a comment at the three tuned values and nowhere else"


def test_what_the_api_server_keeps_is_left_out() -> None:
    assert exported([], {}).manifest["metadata"] == {
        "name": "chat",
        "namespace": "team-a",
        "labels": {"team": "a"},
        "annotations": {"note": "config:\n  numWorkers: here"},
    }
    assert "status" not in exported([], {}).manifest


def test_value_that_was_proven_on_another_base_is_left_out_and_named() -> None:
    made = exported([tuned("numWorkers", "8", "16")], {"numWorkers": 12})
    assert made.manifest["spec"]["engine"]["config"] == {"numWorkers": 12}
    assert made.text().splitlines()[0] == (
        "# numWorkers 16 (d-0003) is left out: it was proven on 8, and the spec now has 12"
    )


def test_pinned_value_is_left_out_since_it_ends() -> None:
    made = exported(
        [tuned("numWorkers", "8", "16"), tuned("numWorkers", "8", "12", "pin:keep")], {"numWorkers": 8}
    )
    assert made.manifest["spec"]["engine"]["config"] == {"numWorkers": 16}
    assert made.left_out == ("numWorkers 12 is left out: override keep holds it there for a while",)
