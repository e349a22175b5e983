"""The status tells what changed, keeps what did not, and is written again only when something changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from kvpilot_operator.resource import ManifestError
from kvpilot_operator.resource.resolve import policy_of
from kvpilot_operator.status.codec import encode_status
from kvpilot_operator.status.conditions import CONDITION_TYPES
from kvpilot_operator.status.model import DECISION_BYTES
from kvpilot_operator.status.render import invalid_status, status_of
from kvpilot_operator.status.snapshot import Key, Replica, Snapshot
from kvpilot_operator.tuning.decision import Decision, DecisionOutcome, Objective, Record
from kvpilot_operator.tuning.observation import Observation, ObservedReplica, Promoted, SourceProblem
from kvpilot_operator.tuning.state import Hold, OverlayEntry, Phase, TuningState

NOW = 1_700_000_000.0


def manifest(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheDeployment",
        "metadata": {"name": "chat", "namespace": "team-a", "generation": 4},
        "spec": {"scaling": {"min": 2, "max": 4}, **spec},
    }


def replica(name: str, *, ready: bool = True, pending: str = "") -> Replica:
    return Replica(name, name, ready, "", "secret", pending_reason=pending)


class Scene:
    """One look at a resource, with what a test does not care about filled in."""

    def __init__(self, *pods: Replica, **spec: Any) -> None:
        self.pods = pods or (replica("a"), replica("b"))
        self.manifest = manifest(**spec)
        self.decision = Decision(TuningState(), objectives=(objective("p95", "Met"),))
        self.observed: dict[str, Any] = {}
        self.replica_failure = ""

    def status(self, before: Mapping[str, Any] | None = None, at: float = NOW) -> dict[str, Any]:
        snapshot = Snapshot(
            Key("team-a", "chat"),
            {**self.manifest, "status": before or {}},
            2,
            self.pods,
            Promoted(17, {"numWorkers": 16}),
            replica_failure=self.replica_failure,
        )
        pods = tuple(ObservedReplica(pod.uid, pod.name, pod.ready) for pod in self.pods)
        observation = Observation(
            at=at,
            replicas=pods,
            base={},
            promoted=snapshot.promoted,
            desired_replicas=2,
            **self.observed,
        )
        made = status_of(snapshot, policy_of(snapshot.resource.spec), observation, self.decision)
        return dict(json.loads(json.dumps(encode_status(made))))


def objective(name: str, state: Literal["Met", "Breached", "Unknown", "Infeasible"]) -> Objective:
    return Objective(name, 0.95, 0.9, 0.9, state)


def record(number: int, outcome: DecisionOutcome, summary: str = "numWorkers 8 -> 16.") -> Record:
    return Record(f"d-{number:04}", NOW + number, "workers-up", outcome, summary, None, ())


def condition(status: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return next(item for item in status["conditions"] if item["type"] == kind)


def test_a_status_has_the_shape_of_the_resource() -> None:
    scene = Scene()
    overlay = (OverlayEntry("numWorkers", 8, 16, "d-0042"),)
    scene.decision = replace(
        scene.decision, state=TuningState(overlay=overlay), records=(record(42, "Promoted"),)
    )
    status = scene.status()
    assert status["observedGeneration"] == 4
    assert (status["replicas"], status["readyReplicas"], status["selector"]) == (2, 2, "kvpilot.io/name=chat")
    assert status["config"]["generation"] == 17
    assert status["config"]["effective"]["numWorkers"] == 16
    assert status["config"]["effective"]["maxTokens"] == 4096
    assert status["config"]["overlay"] == [
        {"knob": "numWorkers", "basedOn": "8", "value": "16", "decision": "d-0042"}
    ]
    assert status["objectives"] == [{"name": "p95", "state": "Met", "since": "2023-11-14T22:13:20Z"}]
    assert status["tuning"]["state"] == "Observe"
    assert status["decisions"] == [
        {
            "id": "d-0042",
            "at": "2023-11-14T22:14:02Z",
            "rule": "workers-up",
            "outcome": "Promoted",
            "summary": "numWorkers 8 -> 16.",
        }
    ]
    assert {item["type"] for item in status["conditions"]} == set(CONDITION_TYPES)
    assert all(item["observedGeneration"] == 4 for item in status["conditions"])


def test_a_steady_state_changes_nothing_however_often_it_is_looked_at() -> None:
    scene = Scene()
    first = scene.status()
    assert scene.status(first, NOW + 3600) == first


def test_figures_in_a_message_alone_rewrite_nothing() -> None:
    scene = Scene()
    hold = Hold("NoRemedy", "p95 attainment is 0.91", NOW)
    scene.decision = replace(scene.decision, state=TuningState(holds=(hold,)), infeasible="ceiling 61% < 70%")
    first = scene.status()
    hold = Hold("NoRemedy", "p95 attainment is 0.87", NOW)
    scene.decision = replace(scene.decision, state=TuningState(holds=(hold,)), infeasible="ceiling 59% < 70%")
    assert scene.status(first, NOW + 60) == first
    hold = Hold("NoRemedy", "every rule is at its bound", NOW)
    scene.decision = replace(scene.decision, state=TuningState(holds=(hold,)))
    second = scene.status(first, NOW + 60)
    assert second["tuning"]["holds"][0]["message"] == "every rule is at its bound"


def test_a_new_spec_has_its_own_figures() -> None:
    scene = Scene()
    scene.decision = replace(scene.decision, infeasible="ceiling 61% < 70%")
    first = scene.status()
    scene.decision = replace(scene.decision, infeasible="ceiling 61% < 90%")
    assert condition(scene.status(first), "Infeasible")["message"].endswith("70%")
    scene.manifest["metadata"]["generation"] = 5
    assert condition(scene.status(first), "Infeasible")["message"].endswith("90%")


def test_a_transition_is_dated_when_the_status_flips_and_not_before() -> None:
    scene = Scene()
    first = scene.status()
    scene.decision = replace(
        scene.decision, objectives=(objective("p50", "Breached"), objective("p95", "Breached"))
    )
    second = scene.status(first, NOW + 60)
    assert condition(second, "SLOMet") == {
        "type": "SLOMet",
        "status": "False",
        "reason": "Breached",
        "message": "Breached: p50, p95.",
        "lastTransitionTime": "2023-11-14T22:14:20Z",
        "observedGeneration": 4,
    }
    assert condition(second, "Ready")["lastTransitionTime"] == condition(first, "Ready")["lastTransitionTime"]
    scene.decision = replace(scene.decision, objectives=(objective("p95", "Breached"),))
    third = scene.status(second, NOW + 120)
    assert condition(third, "SLOMet")["message"] == "Breached: p95."
    assert condition(third, "SLOMet")["lastTransitionTime"] == "2023-11-14T22:14:20Z"
    assert third["objectives"][0]["since"] == "2023-11-14T22:14:20Z"


def test_the_last_ten_actions_are_kept_each_in_512_bytes() -> None:
    scene = Scene()
    status: dict[str, Any] = {}
    for number in range(14):
        scene.decision = replace(scene.decision, records=(record(number, "Started", "é" * 600),))
        status = scene.status(status)
        assert scene.status(status) == status, "the same record again is no news"
    assert [item["id"] for item in status["decisions"]] == [f"d-{n:04}" for n in range(4, 14)]
    for item in status["decisions"]:
        assert len(json.dumps(item, ensure_ascii=False, separators=(",", ":")).encode()) <= DECISION_BYTES
        assert item["summary"].endswith("é…")


def test_rolled_back_tells_of_the_last_verdict() -> None:
    scene = Scene()
    first = scene.status()
    assert not [
        item for item in first["conditions"] if item["type"] == "RolledBack" and item["status"] == "True"
    ]
    scene.decision = replace(scene.decision, records=(record(1, "Reverted", "p95 rose by 12%."),))
    second = scene.status(first)
    assert condition(second, "RolledBack")["message"] == "p95 rose by 12%."
    scene.decision = replace(scene.decision, records=())
    assert condition(scene.status(second), "RolledBack")["status"] == "True"
    scene.decision = replace(scene.decision, records=(record(2, "Promoted"),))
    assert condition(scene.status(second), "RolledBack")["status"] == "False"


def test_values_without_effect_are_named() -> None:
    scene = Scene(engine={"config": {"cacheStrategy": "adaptive", "numWorkers": 8}})
    found = condition(scene.status(), "ConfigEffective")
    assert (found["status"], found["reason"]) == ("False", "NotYetEffective")
    assert found["message"] == "cacheStrategy has no effect yet: adaptive runs as lru"


def test_a_pod_that_does_not_fit_is_named_while_the_rest_serves() -> None:
    scene = Scene(
        replica("a"), replica("b"), replica("c", ready=False, pending="Insufficient nvidia.com/gpu")
    )
    status = scene.status()
    found = condition(status, "Progressing")
    assert (found["status"], found["reason"]) == ("True", "ReplicasPending")
    assert found["message"] == "Waiting for c: Insufficient nvidia.com/gpu"
    assert condition(status, "Ready")["status"] == "True"
    assert (status["replicas"], status["readyReplicas"]) == (3, 2)


def test_new_resource_is_starting_while_too_few_replicas_are_ready() -> None:
    found = condition(Scene(replica("a"), replica("b", ready=False)).status(), "Ready")
    assert (found["reason"], found["message"]) == ("ReplicasStarting", "1 of at least 2 replicas are ready.")


def test_ready_says_why_replicas_do_not_serve() -> None:
    crashed = replica("b", ready=False, pending="CrashLoopBackOff: kvpilot serve: numHeads: must divide 8")
    scene = Scene(replica("a"), crashed)
    found = condition(scene.status(), "Ready")
    assert (found["reason"], found["message"]) == (
        "ReplicasNotReady",
        "1 of at least 2 replicas are ready: b: CrashLoopBackOff: kvpilot serve: numHeads: must divide 8.",
    )
    scene = Scene(replica("a"))
    scene.replica_failure = "FailedCreate: forbidden: exceeded quota: team"
    status = scene.status()
    found = condition(status, "Ready")
    assert found["message"] == (
        "1 of at least 2 replicas are ready: FailedCreate: forbidden: exceeded quota: team."
    )
    found = condition(status, "Progressing")
    assert found["message"] == "Waiting for FailedCreate: forbidden: exceeded quota: team"


def test_what_holds_tuning_back_is_shown() -> None:
    scene = Scene()
    problem = SourceProblem("MetricsUnavailable", "prometheus.example: no answer in 10 s")
    scene.observed = {"metrics_problem": problem}
    status = scene.status()
    found = condition(status, "MetricsTrusted")
    assert (found["reason"], found["message"]) == (problem.reason, problem.message)
    scene.observed = {"paused_by": "chat-pause-x7k"}
    status = scene.status()
    assert condition(status, "Paused")["status"] == "True"
    assert condition(status, "TuningActive")["reason"] == "Paused"
    scene.observed = {"replicas_managed_by": "kubectl-scale"}
    found = condition(scene.status(), "FieldManagerConflict")
    assert found["status"] == "True"
    assert "use spec.replicas" in found["message"]
    assert condition(Scene(tuning={"mode": "Off"}).status(), "TuningActive")["reason"] == "ModeOff"


def test_metrics_that_engines_do_not_export_are_named_with_what_stands_aside() -> None:
    scene = Scene()
    scene.decision = replace(scene.decision, absent=("decode_seconds", "preemptions"))
    found = condition(scene.status(), "MetricsTrusted")
    assert (found["status"], found["reason"]) == ("True", "MetricAbsent")
    assert found["message"] == (
        "Not every engine exports kvpilot_codec_seconds_total. Without it stand aside: compression-down."
    )
    scene.decision = replace(scene.decision, absent=("preemptions", "first_token_within"))
    assert condition(scene.status(), "MetricsTrusted")["reason"] == "Fresh", "nothing reads them"


def test_one_restriction_of_trust_hides_no_other() -> None:
    scene = Scene()
    scene.decision = replace(
        scene.decision, absent=("decode_seconds", "prefetch_used"), partly_trusted="engine-7: silent"
    )
    found = condition(scene.status(), "MetricsTrusted")
    assert (found["status"], found["reason"]) == ("True", "NearlyAll")
    few, absent = found["message"].split(". Not every engine exports ")
    assert few == "Fresh but for a few replicas, which are not judged. engine-7: silent"
    assert absent.startswith("kvpilot_codec_seconds_total, kvpilot_prefetch_blocks_total. Without them stand")


def test_a_bad_spec_leaves_the_rest_of_the_status_alone() -> None:
    scene = Scene()
    scene.decision = replace(scene.decision, state=TuningState(phase=Phase.COOLDOWN, epoch=3))
    before = scene.status()
    bad = {**scene.manifest, "metadata": {**scene.manifest["metadata"], "generation": 5}, "status": before}
    snapshot = Snapshot(Key("team-a", "chat"), bad, 2, (), None)
    after = encode_status(invalid_status(snapshot, ManifestError(["spec.scaling.max: required"]), NOW + 60))
    found = condition(after, "Ready")
    assert (found["status"], found["reason"]) == ("False", "InvalidSpec")
    assert (found["message"], found["observedGeneration"]) == ("spec.scaling.max: required", 5)
    assert after["observedGeneration"] == 4
    assert after["tuning"] == before["tuning"]
