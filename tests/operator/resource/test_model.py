"""A wrong manifest gets one clear line per fault: where, what, and what is allowed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvpilot_operator.resource import KVCacheDeployment, ManifestError, load_manifest, times

SAMPLE: dict[str, Any] = {
    "apiVersion": "kvpilot.io/v1alpha1",
    "kind": "KVCacheDeployment",
    "metadata": {"name": "chat", "namespace": "team-a", "labels": {"team": "a"}},
    "spec": {
        "profile": "production",
        "objectives": {"latency": {"p50Ms": 100, "p95Ms": 500}, "hitRate": "70%"},
        "engine": {"config": {"maxTokens": 16384, "cacheStrategy": "adaptive", "compressionRatio": 0.5}},
        "tuning": {"knobs": [{"name": "numWorkers", "min": 2, "max": 32}]},
        "scaling": {"min": 2, "max": 10},
    },
}


def changed(path: str, value: Any) -> str:
    """The sample as YAML with one field replaced (dotted path); None removes it."""
    document = yaml.safe_load(yaml.safe_dump(SAMPLE))
    *parents, last = path.split(".")
    place = document
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return yaml.safe_dump(document)


def test_a_manifest_becomes_the_model_without_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resource = load_manifest(yaml.safe_dump(SAMPLE))
    assert (resource.metadata.name, resource.metadata.namespace) == ("chat", "team-a")
    assert resource.spec.engine.config.max_tokens == 16384
    assert resource.spec.engine.config.model_fields_set == {
        "max_tokens",
        "cache_strategy",
        "compression_ratio",
    }
    assert (resource.spec.tuning.mode, resource.spec.tuning.pace) == ("Auto", "Standard")
    assert resource.spec.engine.model.source == "builtin/tiny-llama"


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (
            "spec.objectives.latency.p50Ms",
            110,
            "spec.objectives.latency.p50Ms: must be one of the published edges 50, 100, 150, 200, 250, 300, "
            "400, 500, 750, 1000, 1500, 2000, 3000, 5000, 10000, 30000 ms, got 110",
        ),
        (
            "spec.objectives.latency.p95Ms",
            50,
            "spec.objectives.latency: p50Ms <= p95Ms <= p99Ms is required, got [100, 50] ms",
        ),
        (
            "spec.objectives.hitRate",
            "0.7",
            'spec.objectives.hitRate: must be a percentage from "0%" to "100%", written as a string, '
            "got '0.7'",
        ),
        ("spec.objectives.hitRatio", "70%", "spec.objectives.hitRatio: unknown field; did you mean hitRate?"),
        (
            "spec.engine.config.max_tokens",
            512,
            "spec.engine.config: unknown field max_tokens; did you mean maxTokens?",
        ),
        (
            "spec.engine.config.maxTokens",
            10,
            "spec.engine.config.maxTokens: Input should be greater than or equal to 128, got 10",
        ),
        (
            "spec.tuning.mode",
            False,
            'spec.tuning.mode: must be "Off", "Recommend", "Approve" or "Auto"; YAML reads a bare Off as '
            "false, so quote it, got False",
        ),
        (
            "spec.tuning.mode",
            "Ask",
            "spec.tuning.mode: Input should be 'Off', 'Recommend', 'Approve' or 'Auto', got 'Ask'",
        ),
        (
            "spec.tuning.knobs.0.min",
            64,
            "spec.tuning.knobs.0: min <= max is required, got min=64, max=32",
        ),
        (
            "spec.tuning.knobs.0.max",
            1000,
            "spec.tuning.knobs.0: max of numWorkers must be 1 to 128, got 1000",
        ),
        (
            "spec.tuning.knobs.0.name",
            "cacheStrategy",
            "spec.tuning.knobs.0: cacheStrategy has no order, so min and max are not allowed",
        ),
        (
            "spec.tuning.knobs",
            [{"name": "cacheStrategy", "direction": "UpOnly"}],
            "spec.tuning.knobs.0: cacheStrategy has no order, so direction UpOnly is not allowed",
        ),
        (
            "spec.tuning.maintenanceWindows",
            [{"schedule": "0 25 * * *", "duration": "2h"}],
            "spec.tuning.maintenanceWindows.0.schedule: must be a cron schedule: bad hour, got '0 25 * * *'",
        ),
        (
            "spec.tuning.maintenanceWindows",
            [{"schedule": "0 2 * * *", "duration": "30s"}],
            "spec.tuning.maintenanceWindows.0.duration: must be one minute to seven days, such as 90m or 8h, "
            "got '30s'",
        ),
        (
            "spec.scaling.schedules",
            [{"schedule": "0 2 * * *", "duration": "2h", "min": 4, "timeZone": "Mars/Base"}],
            "spec.scaling.schedules.0.timeZone: must be a time zone of the IANA database, such as "
            "\"Europe/Berlin\", got 'Mars/Base'",
        ),
        (
            "spec.scaling.schedules",
            [{"schedule": "0 2 * * *", "duration": "2h", "min": 4, "max": 3}],
            "spec.scaling.schedules.0: min <= max is required, got min=4, max=3",
        ),
        (
            "spec.scaling.schedules",
            [{"schedule": "0 2 * * *", "duration": "2h", "min": 12}],
            "spec.scaling: schedules.0.min must be at most scaling.max 10, unless it has its own max, got 12",
        ),
        ("spec.scaling.min", 11, "spec.scaling: min <= max is required, got min=11, max=10"),
        ("spec.scaling", None, "spec: exactly one of scaling and replicas is required"),
        ("spec.replicas", 3, "spec: exactly one of scaling and replicas is required"),
        ("spec.storage", {}, None),
        ("metadata.name", "9chat", None),
        (
            "spec.rollout",
            {"maxSurge": 0, "maxUnavailable": 0},
            "spec.rollout: maxSurge and maxUnavailable must not both be 0: no rollout could ever move",
        ),
        ("spec.template.spec", {"containers": [{"image": "x"}]}, None),
        ("kind", "Deployment", "kind: must be KVCacheDeployment, got 'Deployment'"),
        ("apiVersion", "kvpilot.io/v1", "apiVersion: must be kvpilot.io/v1alpha1, got 'kvpilot.io/v1'"),
    ],
)
def test_a_fault_is_one_line(path: str, value: Any, line: str | None) -> None:
    with pytest.raises(ManifestError) as caught:
        load_manifest(changed(path, value))
    assert len(caught.value.lines) == 1
    if line is None:
        assert caught.value.lines[0].startswith(path.removesuffix(".spec"))
    else:
        assert caught.value.lines[0] == line


def test_an_unknown_knob_names_the_knobs() -> None:
    with pytest.raises(
        ManifestError, match=r"spec\.tuning\.knobs\.0\.name: must be one of the knobs numWorkers"
    ):
        load_manifest(changed("spec.tuning.knobs.0.name", "workers"))


def test_faults_of_bounds_and_rules_are_shown_together() -> None:
    document = yaml.safe_load(changed("spec.tuning.disabledRules", ["batch-up", "batch"]))
    document["spec"]["tuning"]["knobs"] = [
        {"name": "maxTokens", "min": 100_000}, {"name": "numWorkers", "min": 0}
    ]  # fmt: skip
    with pytest.raises(ManifestError) as caught:
        KVCacheDeployment.parse(document)
    bound, field, rule = caught.value.lines
    assert bound == (
        "spec.tuning.knobs.0: maxTokens would be tuned from 100000 to 65536; give both min and max"
    )
    assert field == "spec.tuning.knobs.1: min of numWorkers must be 1 to 128, got 0"
    assert rule.startswith(
        "spec.tuning.disabledRules.1: no such rule; allowed: memory-emergency, memory-relief, workers-up"
    )
    assert rule.endswith(", got 'batch'")


def test_every_fault_is_shown_at_once() -> None:
    text = changed("spec.scaling.min", 0).replace("p50Ms: 100", "p50Ms: 101")
    with pytest.raises(ManifestError) as caught:
        load_manifest(text)
    assert [line.split(":")[0] for line in caught.value.lines] == [
        "spec.objectives.latency.p50Ms",
        "spec.scaling.min",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "no document; exactly one object is expected"),
        ("a: 1\n---\nb: 2\n", "2 documents; exactly one object is expected"),
        ("- a\n", "a mapping is expected, got list"),
        ("a: [1\n", "not valid YAML: line 2, column 1: "),
        ("a: 1\na: 2\n", "not valid YAML: line 2, column 1: 'a' is given twice"),
        ("a: {{ b }}\n", "not valid YAML: line 1, column 5: a key must be plain text; is a {{ "),
    ],
)
def test_text_that_is_no_manifest(text: str, line: str) -> None:
    with pytest.raises(ManifestError) as caught:
        load_manifest(text)
    assert caught.value.lines[0].startswith(line)


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    with pytest.raises(ManifestError, match=r"none\.yaml: cannot be read: No such file"):
        load_manifest(missing)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="not UTF-8 text"):
        load_manifest(binary)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("0s", 0)])
def test_duration_in_seconds(text: str, seconds: float) -> None:
    assert times.duration_s(text) == seconds


def test_text_that_is_no_duration_is_refused_with_examples() -> None:
    with pytest.raises(ValueError, match="'1 hour' is not a duration such as 90s, 10m or 1h30m"):
        times.duration_s("1 hour")


def test_status_and_foreign_metadata_pass_through() -> None:
    document = {**SAMPLE, "status": {"anything": 1}}
    resource = KVCacheDeployment.parse(document)
    assert resource.status == {"anything": 1}
    assert resource.metadata.generation == 0
