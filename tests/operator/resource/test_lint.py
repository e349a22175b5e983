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
from kvpilot_operator.tuning.rules.bands import Band, bands, cycles
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
    said = [line for line in done.output.splitlines() if not line.startswith("info: ")]
    assert said in ([], [f"{path}: nothing found"])


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


def based(config: dict[str, Any], *knobs: dict[str, Any], **tuning: Any) -> list[str]:
    return lines({"engine": {"config": config}, "tuning": {"knobs": list(knobs), **tuning}})


ONLY_UP = {"direction": "UpOnly"}


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            based({"numWorkers": 8}, {"name": "numWorkers", "max": 8, **ONLY_UP}),
            "warning: spec.engine.config."
            "numWorkers: workers-up can never fire: numWorkers is 8, its max; max "
            "128 or a lower value lets it act",
        ),
        (
            based({"maxStepTokens": 8192}, {"name": "maxStepTokens", **ONLY_UP}),
            "warning: spec.engine.config."
            "maxStepTokens: step-tokens-up can never fire: maxStepTokens is 8192, "
            "its max; max 16384 or a lower value lets it act",
        ),
        (  # the engine itself accepts no more, and the rule that could lower it first is disabled
            based({"numWorkers": 128}, disabledRules=["workers-down"]),
            "warning: spec.engine.config."
            "numWorkers: workers-up can never fire: numWorkers is 128, its max; a "
            "lower value lets it act",
        ),
        (
            based({"numWorkers": 8}, {"name": "numWorkers", "max": 8}),
            "info: spec.engine.config."
            "numWorkers: workers-up can fire only after workers-down: numWorkers is "
            "8, its max; max 128 or a lower value lets it act",
        ),
        (
            based({"numWorkers": 1}, disabledRules=["workers-up"]),
            "warning: spec.engine.config."
            "numWorkers: workers-down can never fire: numWorkers is 1, its min; a "
            "higher value lets it act",
        ),
        (
            based({"numWorkers": 8, "batchSize": 8}, {"name": "batchSize", "tune": False}),
            "info: spec.engine.config."
            "numWorkers: workers-up can fire only after workers-down: numWorkers is 8, "
            "and more would wait for batchSize 8; a larger batchSize lets it act",
        ),
        (
            based({"numWorkers": 8, "batchSize": 8}, {"name": "numWorkers", "tune": False}),
            "info: spec.engine.config."
            "batchSize: batch-up can fire only after memory-emergency: batchSize is 8, and more would "
            "wait for numWorkers 8; a larger numWorkers lets it act",
        ),
        (
            based({"cacheStrategy": "adaptive"}),
            "info: spec.engine.config."
            "cacheStrategy: strategy-adaptive can never fire: cacheStrategy is "
            "adaptive, which runs as lru so far; lfu or fifo lets it act",
        ),
        (
            based({"cacheStrategy": "lru"}),
            "info: spec.engine.config."
            "cacheStrategy: strategy-adaptive can never fire: cacheStrategy is lru, "
            "and adaptive runs as that so far; lfu or fifo lets it act",
        ),
        (
            lines({"objectives": {"hitRate": "0%"}}),
            "info: spec.objectives.hitRate: "
            "compression-up can never fire: 0% asks for no hit rate; any above "
            "lets it act",
        ),
        (
            based({"useCompression": False}, {"name": "useCompression", "tune": False}),
            "info: spec.engine.config."
            "useCompression: compression-up can never fire: useCompression is false, "
            "and excluded from tuning; true lets it act",
        ),
        (
            based({"useCompression": False}, disabledRules=["compression-up"]),
            "warning: spec.engine.config."
            "useCompression: compression-down can never fire: useCompression is "
            "false, and nothing turns it on; true lets it act",
        ),
        (
            based({}, disabledRules=["compression-down"]),
            "warning: spec.engine.config."
            "compressionRatio: compression-up can never fire: compressionRatio is "
            "0.3, and no level is lower; a higher value lets it act",
        ),
        (
            based({"compressionRatio": 0.52}, {"name": "compressionRatio", "min": 0.5, "max": 0.9}),
            "warning: spec.engine.config."
            "compressionRatio: compression-down can never fire: compressionRatio "
            "is 0.52, and the next level 1 is outside of 0.5 to 0.9; wider bounds let it act",
        ),
        (  # it switches prefetching off only where the size may be lowered no further
            based({}, {"name": "prefetchSize", "tune": False}),
            "info: spec.tuning.knobs: prefetch-down can never fire: prefetchSize is excluded from tuning",
        ),
        (
            based({"prefetchSize": 8}, {"name": "prefetchSize", **ONLY_UP}),
            "warning: spec.tuning.knobs: prefetch-down can never fire: prefetchSize has direction UpOnly",
        ),
        (
            based({"hostMemoryMb": 0}, {"name": "hostMemoryMb", "tune": False}),
            "info: spec.engine.config."
            "hostMemoryMb: prefetch-up can never fire: hostMemoryMb is 0 and stays so",
        ),
    ],
)
def test_a_base_value_that_keeps_a_rule_from_acting_is_named(found: list[str], line: str) -> None:
    assert line in found


@pytest.mark.parametrize(
    "found",
    [
        based({}),
        # At a bound another rule leads the knob away from, and at the min where a load would not raise it.
        based({"numWorkers": 1, "batchSize": 1, "prefetchSize": 0}),
        based({"numWorkers": 16, "batchSize": 16}),
        based({"numWorkers": 16, "batchSize": 20}),
        based({"useCompression": False}),
        based({"enablePrefetch": False, "prefetchSize": 0}),
        based({"cacheStrategy": "lfu"}),
        # One of two quotas can still grow.
        based({"maxTokens": 65536}),
        # Prefetching can be switched off.
        based({"prefetchSize": 4}, {"name": "prefetchSize", "min": 4, **ONLY_UP}),
        based({"hostMemoryMb": 65536}),
        # Without hits asked for, a quota is still what requests that wait for pages need.
        [line for line in lines({"objectives": {"hitRate": "0%"}}) if "cache-quota-up" in line],
    ],
)
def test_a_rule_that_can_act_now_or_later_is_no_finding(found: list[str]) -> None:
    assert found == []


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


def cycling(**spec: Any) -> list[tuple[str, str]]:
    """First and second rule of each pair that can cycle."""
    found = [line.split() for line in lines(spec) if " can cycle: " in line]
    return [(words[2], words[4]) for words in found]


BATCH = [("workers-up", "memory-emergency"), ("batch-up", "memory-emergency")]
LEVELS = [("compression-up", "compression-down")]
QUOTAS = ("maxMemoryMb", "maxTokens", "hostMemoryMb", "compressionRatio")
TIER = {"config": {"hostMemoryMb": 256}}


def excluded(*names: str) -> list[dict[str, Any]]:
    return [{"name": name, "tune": False} for name in names]


@pytest.mark.parametrize(
    ("spec", "pairs"),
    [
        ({}, []),
        ({"engine": TIER}, []),
        # Nothing frees memory before the emergency cuts the batch, which queues then let grow again.
        ({"tuning": {"disabledRules": ["memory-relief"]}}, BATCH),
        ({"objectives": {"memory": "97%"}}, BATCH),
        ({"tuning": {"knobs": excluded(*QUOTAS)}}, BATCH),
        ({"tuning": {"knobs": [{"name": name, "direction": "UpOnly"} for name in QUOTAS]}}, BATCH),
        ({"tuning": {"disabledRules": ["memory-relief", "workers-up"]}}, BATCH[1:]),
        # A lower level keeps fewer blocks, and the tier cannot grow with it; a higher one costs decoding.
        ({"engine": TIER, "tuning": {"knobs": excluded("hostMemoryMb")}}, LEVELS),
        (
            {"engine": TIER, "tuning": {"knobs": [{"name": "hostMemoryMb", "direction": "DownOnly"}]}},
            LEVELS,
        ),
        # What the findings offer ends them.
        ({"tuning": {"disabledRules": ["memory-relief", "workers-up", "batch-up"]}}, []),
        (
            {
                "tuning": {
                    "disabledRules": ["memory-relief"],
                    "knobs": [{"name": "batchSize", "direction": "DownOnly"}],
                }
            },
            [],
        ),
        (
            {
                "engine": TIER,
                "tuning": {"knobs": excluded("hostMemoryMb"), "disabledRules": ["compression-up"]},
            },
            [],
        ),
        # Without a tier there is nothing to compress, and in other modes a person decides.
        ({"engine": {"config": {"hostMemoryMb": 0}}, "tuning": {"knobs": excluded("hostMemoryMb")}}, []),
        ({"tuning": {"mode": "Recommend", "disabledRules": ["memory-relief"]}}, []),
    ],
)
def test_pairs_that_cycle_over_two_signals_are_found(spec: dict[str, Any], pairs: list[Any]) -> None:
    assert cycling(**spec) == pairs


def test_a_cycle_names_the_rules_the_knob_the_signals_and_the_ways_out() -> None:
    assert (
        "warning: spec.tuning: batch-up and memory-emergency can cycle: batch-up raises batchSize against "
        "batch wait, which raises memory; memory-emergency then lowers it, which raises batch wait again. To "
        "end it, take memory-relief out of spec.tuning.disabledRules, so that it acts first, give batchSize "
        "direction: DownOnly, or list batch-up in spec.tuning.disabledRules."
    ) in tuned(disabledRules=["memory-relief"])
    assert any("let memory-relief act first (maxMemoryMb is excluded" in line
               for line in tuned(knobs=excluded(*QUOTAS)))  # fmt: skip
    assert any("To end it, lower spec.objectives.memory, so that memory-relief acts first" in line
               for line in lines({"objectives": {"memory": "97%"}}))  # fmt: skip
    assert (
        "warning: spec.tuning: compression-up and compression-down can cycle: compression-up lowers "
        "compressionRatio against misses, which raises tier load; compression-down then raises it, which "
        "raises misses again. To end it, let hostMemoryMb go up with it in spec.tuning.knobs, give "
        "compressionRatio direction: UpOnly, or list compression-up or compression-down in "
        "spec.tuning.disabledRules."
    ) in lines({"engine": TIER, "tuning": {"knobs": excluded("hostMemoryMb")}})


@pytest.mark.parametrize("memory", [percent / 100 for percent in range(1, 96)])
def test_no_pair_of_rules_can_cycle_by_itself(memory: float) -> None:
    objectives = PRODUCTION.__class__(**{**PRODUCTION.__dict__, "memory": memory})
    assert list(cycles(REMEDIES, bands(policy_of(objectives=objectives)), lambda _: True)) == []


def test_bands_without_a_gap_are_no_guard() -> None:
    found = [band for band in bands(policy_of()) if band.rule not in {"cache-quota-up", "memory-relief"}]
    touching = [Band("cache-quota-up", "memory", 0.0, 0.8), Band("memory-relief", "memory", 0.8, 1.0)]
    pairs = [
        (item.move.knob, *(rule.name for rule in item.rules), item.signals)
        for item in cycles(REMEDIES, (*found, *touching), lambda _: True)
    ]
    assert pairs == [
        (knob, "cache-quota-up", "memory-relief", ("misses", "memory"))
        for knob in ("maxTokens", "hostMemoryMb")
    ]


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


def test_a_manifest_without_findings_is_said_to_have_none(tmp_path: Path) -> None:
    path = manifest(tmp_path)
    done = CliRunner().invoke(app, ["lint", str(path)])
    assert (done.exit_code, done.stdout) == (0, f"{path}: nothing found\n")
    assert json.loads(CliRunner().invoke(app, ["lint", str(path), "-o", "json"]).stdout) == []


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
