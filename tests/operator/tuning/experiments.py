"""An experiment in flight on three replicas, for the tests of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.operator.tuning.observations import BAD, NOW, observe, replica
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.context import Context, Draft
from kvpilot_operator.tuning.decide import assess
from kvpilot_operator.tuning.observation import Observation, ObservedReplica
from kvpilot_operator.tuning.state import Change, KnobChange, Phase, ReplicaRef, TuningState

CONFIG = {"numWorkers": 2, "batchSize": 8}
CANDIDATE = {"numWorkers": 4, "batchSize": 8}
NAMES = ("chat-0", "chat-1", "chat-2")
CURED = {"p50": 0.9, "p95": 0.99, "p99": 1.0}


def change(*, since: float = 0.0, controls: tuple[str, ...] = NAMES[1:], **fields: Any) -> Change:
    """numWorkers 2 -> 4 on chat-0, in its phase for ``since`` s."""
    given: dict[str, Any] = {
        "id": "d-0001",
        "rule": "workers-up",
        "values": (KnobChange("numWorkers", 2, 4),),
        "epoch": 1,
        "generation": 2,
        "started_at": NOW - since,
        "phase_since": NOW - since,
        "canary": ReplicaRef("uid-chat-0", "chat-0"),
        "controls": tuple(ReplicaRef(f"uid-{name}", name) for name in controls),
        "restarts": 0,
        "objective": "p95",
        "predicted_gain": 0.4,
        "measure": "capacity",
        "ratio": 1.8,
        "measured_from": NOW - since,
    }
    return Change(**{**given, **fields})


def in_phase(phase: Phase, **fields: Any) -> TuningState:
    """The state with that change in a phase."""
    return TuningState(phase=phase, epoch=1, last_generation=2, next_decision=2, change=change(**fields))


def canary(**figures: Any) -> ObservedReplica:
    """The canary, which runs the candidate."""
    given = {"config": CANDIDATE, "generation": 2, "epoch": 1, "attained": BAD, **figures}
    return replica("chat-0", **given)


def controls(**figures: Any) -> tuple[ObservedReplica, ...]:
    """The controls, which run the promoted configuration."""
    return tuple(replica(name, **{"attained": BAD, **figures}) for name in NAMES[1:])


def seen(*replicas: ObservedReplica, **changes: Any) -> Observation:
    """An observation in which numWorkers 2 is promoted."""
    return observe(*replicas, config=CONFIG, **changes)


def context(observation: Observation, **policy: Any) -> Context:
    """The context of a decision on it."""
    return assess(observation, policy_of(**policy), NOW)


def verified(
    canary_figures: Mapping[str, Any], control_figures: Mapping[str, Any], seconds: float = 60.0
) -> Observation:
    """Both arms after ``seconds`` of verification, with their figures of that window."""
    return seen(
        canary(verify=dict(canary_figures), seconds=seconds),
        *controls(verify=dict(control_figures), seconds=seconds),
    )


def restarted(item: ObservedReplica) -> ObservedReplica:
    """The replica after a restart of its container."""
    return replace(item, restarts=item.restarts + 1)


def begun(draft: Draft) -> Change:
    """The change in flight."""
    assert draft.state.change is not None
    return draft.state.change
