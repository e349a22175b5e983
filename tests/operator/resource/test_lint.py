"""What ``kvpilot lint`` finds in a manifest that is valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.operator.tuning.policies import PRODUCTION, policy_of
from typer.testing import CliRunner

from kvpilot_operator.cli import app
from kvpilot_operator.resource.lint import lint
from kvpilot_operator.resource.model import DeploymentSpec
from kvpilot_operator.tuning.rules.bands import WAYS, Band, bands, cycles
from kvpilot_operator.tuning.rules.order import REMEDIES

EXAMPLES = sorted(
    path for path in Path("examples").glob("*.yaml") if "kind: KVCacheDeployment" in path.read_text()
)
NOON = 1_780_000_000.0


def lines(spec: dict[str, Any]) -> list[str]:
    given = {"scaling": {"min": 1, "max": 4}, **spec}
    if "replicas" in spec:
        del given["scaling"]
    return [finding.line for finding in lint(DeploymentSpec.model_validate(given), NOON)]


def tuned(**tuning: Any) -> list[str]:
    return lines({"tuning": tuning})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_clean(path: Path) -> None:
    done = CliRunner().invoke(app, ["lint", str(path)])
    assert done.exit_code == 0
    assert [line for line in done.output.splitlines() if not line.startswith("info: ")] == []


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (tuned(mode="Off"), "info: spec.tuning.mode: Off: no rule can ever fire"),
        (
            tuned(disabledRules=["batch-up"]),
            "info: spec.tuning.disabledRules: batch-up can never fire: it is disabled",
        ),
        (
            tuned(knobs=[{"name": "maxStepTokens", "tune": False}]),
            "info: spec.tuning.knobs: step-tokens-up can never fire: maxStepTokens is excluded from tuning",
        ),
        (
            tuned(knobs=[{"name": "maxStepTokens", "min": 512, "max": 512}]),
            "warning: spec.tuning.knobs: step-tokens-up can never fire: maxStepTokens has min and max 512",
        ),
        (
            tuned(knobs=[{"name": "numWorkers", "direction": "UpOnly"}]),
            "warning: spec.tuning.knobs: workers-down can never fire: numWorkers has direction UpOnly",
        ),
        (
            lines({"scaling": {"min": 3, "max": 4, "direction": "OutOnly"}}),
            "info: spec.scaling.direction: replicas-down can never fire: direction is OutOnly",
        ),
        (
            lines(
                {
                    "engine": {"config": {"numWorkers": 64}},
                    "tuning": {"knobs": [{"name": "numWorkers", "min": 1, "max": 32}]},
                }
            ),
            "error: spec.engine.config.numWorkers: 64 is outside of the tuner's bounds 1 to 32; widen them "
            "in spec.tuning.knobs, or give the knob tune: false there",
        ),
        (
            lines({"objectives": {"memory": "97%"}}),
            "warning: spec.objectives.memory: 97% is above 95%, where memory-emergency cuts the batch at "
            "once: memory-relief would come too late",
        ),
        (
            lines({"objectives": {"hitRate": "100%"}}),
            "error: spec.objectives.hitRate: 100% can never be met: the first tokens of every prompt are new "
            "once",
        ),
        (
            lines(
                {
                    "engine": {"config": {"numWorkers": 16, "maxTokens": 1024}},
                    "tuning": {"knobs": [{"name": "maxTokens", "tune": False}]},
                }
            ),
            "error: spec.objectives.hitRate: 70% is out of reach: maxTokens 1024 holds less than a block of "
            "128 tokens for each of 16 workers, so requests evict each other's prefixes",
        ),
        (
            lines({"objectives": {"throughput": {"target": 900_000}}}),
            "error: spec.objectives.throughput.target: 900000 requests/s are out of reach: 4 replicas with "
            "at most 128 workers would have to end each request within 0.57 ms",
        ),
        (
            lines(
                {
                    "scaling": {
                        "min": 2,
                        "max": 4,
                        "schedules": [{"schedule": "0 8 * * *", "duration": "8h", "min": 2}],
                    }
                }
            ),
            "warning: spec.scaling.schedules.0.min: min 2 has no effect: scaling.min is 2",
        ),
        (
            lines(
                {
                    "scaling": {
                        "min": 1,
                        "max": 9,
                        "schedules": [
                            {"schedule": "0 8 * * *", "duration": "8h", "min": 2, "max": 3},
                            {"schedule": "0 9 * * *", "duration": "1h", "min": 5},
                        ],
                    }
                }
            ),
            "warning: spec.scaling.schedules.0.max: max 3 is below min 5 of schedule 1, which wins while "
            "both are open",
        ),
    ],
)
def test_a_finding_is_one_line(found: list[str], line: str) -> None:
    assert line in found


def test_a_budget_of_gpus_that_no_schedule_can_have() -> None:
    limits = {"resources": {"limits": {"nvidia.com/gpu": "2"}}}
    schedule = {"schedule": "0 8 * * *", "duration": "8h", "min": 3, "max": 4}
    found = lines(
        {
            "template": {"spec": {"containers": [{"name": "engine", **limits}]}},
            "tuning": {"budgets": {"maxGPUs": 4}},
            "scaling": {"min": 2, "max": 4, "schedules": [schedule]},
        }
    )
    assert found == [
        "error: spec.scaling.schedules.0.min: 3 is out of reach: budgets.maxGPUs allows 2 replicas",
        "warning: spec.tuning.budgets.maxGPUs: replicas-up can never fire: it allows 2 replicas, as many as "
        "the minimum",
    ]


def test_a_window_that_hardly_ever_opens() -> None:
    found = tuned(maintenanceWindows=[{"schedule": "0 2 29 2 *", "duration": "2h"}])
    assert found == [
        "warning: spec.tuning.maintenanceWindows.0: it does not open within a year: the next time is "
        "2028-02-29 02:00 UTC"
    ]


def test_the_ways_of_the_rules_are_complete() -> None:
    moving = {remedy.name for remedy in REMEDIES if remedy.knobs and remedy.name != "strategy-adaptive"}
    assert set(WAYS) == moving


@pytest.mark.parametrize("memory", [percent / 100 for percent in range(1, 101)])
def test_no_pair_of_rules_can_cycle(memory: float) -> None:
    objectives = PRODUCTION.__class__(**{**PRODUCTION.__dict__, "memory": memory})
    assert list(cycles(bands(policy_of(objectives=objectives)))) == []


def test_a_pair_without_a_gap_is_found() -> None:
    grow, shrink = (
        Band("cache-quota-up", "maxTokens", "up", "memory", 0.0, 0.8),
        Band("memory-relief", "maxTokens", "down", "memory", 0.8, 1.0),
    )
    assert list(cycles((grow, shrink))) == [(grow, shrink)]
    apart = Band("cache-quota-up", "maxTokens", "up", "memory", 0.0, 0.72)
    assert list(cycles((apart, shrink))) == []


def manifest(tmp_path: Path, **spec: Any) -> Path:
    path = tmp_path / "chat.yaml"
    document = {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheDeployment",
        "metadata": {"name": "chat"},
        "spec": {"scaling": {"min": 1, "max": 4}, **spec},
    }
    path.write_text(yaml.safe_dump(document))
    return path


def test_an_error_ends_with_1_and_json_is_for_programs(tmp_path: Path) -> None:
    path = manifest(tmp_path, objectives={"hitRate": "100%"})
    done = CliRunner().invoke(app, ["lint", str(path), "-o", "json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout) == [
        {
            "severity": "error",
            "field": "spec.objectives.hitRate",
            "message": "100% can never be met: the first tokens of every prompt are new once",
        }
    ]


def test_what_is_asked_for_ends_with_0(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["lint", str(manifest(tmp_path, tuning={"mode": "Off"}))])
    assert (done.exit_code, done.stdout) == (0, "info: spec.tuning.mode: Off: no rule can ever fire\n")


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        (
            {"tuning": {"maintenanceWindows": [{"schedule": "0 2 31 4 *", "duration": "2h"}]}},
            "spec.tuning.maintenanceWindows.0.schedule: must be a cron schedule: bad day-of-month, "
            "got '0 2 31 4 *'",
        ),
        ({"scaling": {"min": 4, "max": 1}}, "spec.scaling: min <= max is required, got min=4, max=1"),
        (
            {"objectives": {"latency": {"p50Ms": 2000}}},
            "spec.objectives.latency: p50Ms <= p95Ms <= p99Ms is required, got p50Ms=2000, p95Ms=500, "
            "p99Ms=1000 (what is not given comes from profile production)",
        ),
    ],
)
def test_an_invalid_manifest_ends_with_2_and_one_line(tmp_path: Path, spec: Any, line: str) -> None:
    path = manifest(tmp_path, **spec)
    done = CliRunner().invoke(app, ["lint", str(path)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"kvpilot lint: {path}: {line}\n"
