"""What a spec means: profile, overrides, bounds."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from kvpilot_engine.contract import CATALOGUE
from kvpilot_engine.contract.config import QUIET
from kvpilot_operator.resource import DeploymentSpec, ManifestError
from kvpilot_operator.resource.resolve import base_config, gpus_of, not_yet_effective, policy_of
from kvpilot_operator.tuning.pace import PACES


def spec(**fields: Any) -> DeploymentSpec:
    return DeploymentSpec.model_validate({"scaling": {"min": 1, "max": 4}, **fields}, context=QUIET)


@pytest.mark.parametrize(
    ("profile", "latency", "rest"),
    [
        ("development", {"p50": (0.2, 0.5)}, (20, 10, 0.5, 0.9, 0.05)),
        (
            "production",
            {"p50": (0.1, 0.5), "p95": (0.5, 0.95), "p99": (1.0, 0.99)},
            (100, 50, 0.7, 0.8, 0.01),
        ),
        (
            "highPerformance",
            {"p50": (0.05, 0.5), "p95": (0.2, 0.95), "p99": (1.0, 0.99)},
            (200, 100, 0.8, 0.7, 0.01),
        ),
    ],
)
def test_a_profile_gives_every_objective(
    profile: str, latency: dict[str, Any], rest: tuple[float, ...]
) -> None:
    found = policy_of(spec(profile=profile)).objectives
    assert dict(found.latency) == latency
    assert (found.throughput, found.floor, found.hit_rate, found.memory, found.errors) == rest
    assert found.signal == "request"


def test_what_is_given_overrides_the_profile() -> None:
    given = {
        "latency": {"signal": "firstToken", "p95Ms": 750},
        "throughput": {"target": 30},
        "hitRate": "62.5%",
        "errors": "0.5%",
    }
    found = policy_of(spec(objectives=given)).objectives
    assert found.signal == "firstToken"
    assert dict(found.latency) == {"p50": (0.1, 0.5), "p95": (0.75, 0.95), "p99": (1.0, 0.99)}
    assert (found.throughput, found.floor) == (30, 15)
    assert (found.hit_rate, found.memory, found.errors) == (0.625, 0.8, 0.005)


def test_an_override_that_contradicts_the_profile_says_so() -> None:
    with pytest.raises(ManifestError) as caught:
        policy_of(spec(objectives={"latency": {"p50Ms": 750}}))
    assert caught.value.lines == (
        "spec.objectives.latency: p50Ms <= p95Ms <= p99Ms is required, got p50Ms=750, p95Ms=500, p99Ms=1000 "
        "(what is not given comes from profile production)",
    )


def test_bounds_are_the_catalogues_with_the_users_over_them() -> None:
    knobs = [
        {"name": "numWorkers", "min": 2, "max": 32},
        {"name": "cacheStrategy", "tune": False},
        {"name": "prefetchSize", "max": 256},
    ]
    bounds = policy_of(spec(tuning={"knobs": knobs})).bounds
    assert set(bounds) == {knob.resource_name for knob in CATALOGUE}
    assert (bounds["numWorkers"].minimum, bounds["numWorkers"].maximum) == (2, 32)
    assert (bounds["prefetchSize"].minimum, bounds["prefetchSize"].maximum) == (0, 256)
    assert not bounds["cacheStrategy"].tune
    assert bounds["batchSize"].tune


def test_pace_scales_durations_and_not_counts() -> None:
    pace = policy_of(spec(tuning={"pace": "Fast"}), 0.5).pace
    assert (pace.settle, pace.requests_per_arm, pace.scrape) == (
        PACES["Fast"].settle / 2,
        PACES["Fast"].requests_per_arm,
        PACES["Fast"].scrape,
    )


def test_scaling_is_none_when_somebody_else_chooses() -> None:
    assert policy_of(DeploymentSpec.model_validate({"replicas": 3})).scaling is None
    scaling = policy_of(spec()).scaling
    assert scaling is not None
    assert (scaling.minimum, scaling.maximum, scaling.direction) == (1, 4, "Both")


def test_base_holds_what_was_given_and_nothing_else() -> None:
    given = spec(engine={"config": {"cacheStrategy": "adaptive", "numWorkers": 8, "enableWarmup": True}})
    dumped = base_config(given).model_dump(by_alias=True, exclude_unset=True, mode="json")
    assert dumped == {"cacheStrategy": "adaptive", "numWorkers": 8, "enableWarmup": True}
    assert [notice.field for notice in not_yet_effective(given)] == ["cacheStrategy", "enableWarmup"]
    assert not_yet_effective(spec()) == []


def test_disabled_rules_are_the_users() -> None:
    policy = policy_of(spec(tuning={"disabledRules": ["batch-up", "replicas-down"]}))
    assert policy.disabled_rules == {"batch-up", "replicas-down"}


def test_field_that_is_no_knob_has_no_bounds() -> None:
    assert "quantizationBits" not in policy_of(spec()).bounds
    fault = "quantizationBits is none, and only spec"
    with pytest.raises(ValidationError, match=fault):
        spec(tuning={"knobs": [{"name": "quantizationBits"}]})


def gpu_spec(**budgets: Any) -> DeploymentSpec:
    containers = [
        {"name": "engine", "resources": {"limits": {"nvidia.com/gpu": "2"}}},
        {"name": "sidecar", "resources": {"limits": {"memory": "1Gi"}}},
    ]
    return DeploymentSpec.model_validate(
        {
            "scaling": {"min": 2, "max": 10},
            "template": {"spec": {"containers": containers}},
            "tuning": {"budgets": budgets},
        }
    )


def test_the_budget_of_gpus_is_a_number_of_replicas() -> None:
    assert gpus_of(gpu_spec()) == 2
    for budget, limit in ((None, None), (9, 4), (20, 10)):
        scaling = policy_of(gpu_spec(maxGPUs=budget)).scaling
        assert scaling is not None
        assert (scaling.gpu_limit, scaling.gpus) == (limit, 2)


def test_a_budget_of_gpus_below_the_minimum_is_refused() -> None:
    with pytest.raises(ManifestError) as caught:
        policy_of(gpu_spec(maxGPUs=3))
    assert caught.value.lines == ("spec.tuning.budgets.maxGPUs: 2 replicas with 2 GPUs each need 4, got 3",)


def test_a_number_of_gpus_that_is_none_is_refused() -> None:
    spec = {"containers": [{"name": "engine", "resources": {"limits": {"nvidia.com/gpu": "two"}}}]}
    given = DeploymentSpec.model_validate({"replicas": 1, "template": {"spec": spec}})
    with pytest.raises(ManifestError, match=r"containers\[engine\].resources.limits: nvidia.com/gpu must be"):
        gpus_of(given)
