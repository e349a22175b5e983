"""A status stays small however much the tuner remembers: etcd and every watcher carry it whole."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from kvpilot_operator.status.codec import encode_status, fitted, overlay_status, tuning_status
from kvpilot_operator.status.conditions import CONDITION_TYPES, MESSAGE_LIMIT
from kvpilot_operator.status.model import (
    DECISION_BYTES,
    KEPT_GENERATIONS,
    MAX_DECISIONS,
    STATUS_BYTES,
    ConditionStatus,
    ConfigStatus,
    DecisionStatus,
    ObjectiveStatus,
    Status,
)
from kvpilot_operator.status.render import effective_config
from kvpilot_operator.tuning.configuration import KNOBS
from kvpilot_operator.tuning.decision import OBJECTIVE_KINDS
from kvpilot_operator.tuning.state import (
    MAX_BLOCKED_VALUES,
    MAX_CONTROLS,
    MAX_EXPECTED,
    MAX_GENERATIONS,
    MAX_HANDLED,
    MAX_HOLDS,
    MAX_LONGEST,
    MAX_MARKS,
    MAX_REPORTED,
    MAX_REVERSALS,
    MAX_SPENT,
    BlockedValue,
    Change,
    Effect,
    Expected,
    Generation,
    Hold,
    KnobChange,
    LongestRequest,
    OverlayEntry,
    Pending,
    Phase,
    Prediction,
    ReplicaMark,
    ReplicaRef,
    Reported,
    Reversal,
    Spent,
    StepRate,
    Tally,
    TuningState,
)

NOW = 1_780_000_000.123
SENTENCE = (
    "what was found, with its figures, as long as such a sentence is when it names three of the replicas"
)
PREDICTION = Prediction.rounded("memory", 0.123456789, 0.123456789, 0.123456789)
POD = ReplicaRef("0f5c2f8e-9d9e-4f3f-8a55-1b2c3d4e5f60", "chat-production-7c9f6d5b8-x2k4q")


def change(replicas: int) -> Change:
    values = tuple(KnobChange(knob, 12, 16) for knob in ("numWorkers", "batchSize", "maxStepTokens"))
    return Change(
        "d-0042", "workers-up", values, 99, 99, NOW, NOW, POD,
        (POD,) * min(replicas - 1, MAX_CONTROLS), 3, "throughput", 0.71,
        verdict="Promoted", why=SENTENCE, approved_by="ada.lovelace@example.org", measure="capacity",
        ratio=1.2345678901234567, seed=2**32, measured_from=NOW, drained=True,
        rate_before=StepRate(
            1.2345678901234567, 123.45678901234567, 256.0, 12.345678901234567, 0.012345678901234567
        ),
        errors_before=0.12345678901234567, judged_before=123.45678901234567,
        difference_before=Effect(0.12345678901234567, 0.0123456789012345),
        tally=Tally(12, 0.12345678901234567, 0.12345678901234567, 1234.0, NOW), crossed_at=NOW,
        work=Tally(12, 0.12345678901234567, 0.12345678901234567, 1234.0, NOW),
        work_before=Effect(0.12345678901234567, 0.0123456789012345),
        deadline=NOW, unseen_since=NOW,
    )  # fmt: skip


def full_state(replicas: int) -> TuningState:
    """Every list at its maximum, with entries of the usual length."""
    knobs = dict.fromkeys(KNOBS, 65536)
    values = change(replicas).values
    return TuningState(
        phase=Phase.VERIFY,
        epoch=1000,
        last_generation=1000,
        next_decision=1000,
        overlay=tuple(OverlayEntry(knob, 128, 65536, "d-0042") for knob in KNOBS),
        change=change(replicas),
        cooldown_until=NOW,
        holds=(Hold("OutsideMaintenanceWindow", SENTENCE, NOW),) * MAX_HOLDS,
        blocked_values=(BlockedValue("maxStepTokens", 65536, NOW),) * MAX_BLOCKED_VALUES,
        reversals=(Reversal("maxStepTokens", NOW),) * MAX_REVERSALS,
        scale_down=(ReplicaMark(NOW, 100),) * MAX_MARKS,
        reported=(Reported("cache-quota-up:maxTokens 16384 -> 24576", NOW),) * MAX_REPORTED,
        boosted=100,
        pending=(
            Pending("d-0042", "workers-up", values, 0, "p95", 0.71, SENTENCE, NOW, NOW),
            Pending("d-0043", "replicas-up", (), 9, "", 0.0, SENTENCE, NOW, NOW),
        ),
        handled=("chat-approve-d-0042-x7k2p",) * MAX_HANDLED,
        generations=(Generation(1000, NOW, "d-0042", "Promoted", json.dumps(knobs, separators=(",", ":"))),)
        * MAX_GENERATIONS,
        rules_hash="0123abcd",
        spent=(Spent("cacheLost", NOW, 123456789012.0),) * MAX_SPENT,
        longest=(LongestRequest(131072, NOW),) * MAX_LONGEST,
        expected=(
            Expected("d-0042", "memory-emergency", "batchSize 65536 -> 32768", PREDICTION, NOW, 100, NOW),
        )
        * MAX_EXPECTED,
    )


def full_status(replicas: int) -> Status:
    state = full_state(replicas)
    decision = DecisionStatus(
        id="d-0042", at=NOW, rule="workers-up", outcome="Promoted", summary="", verdict="Promoted"
    )
    room = DECISION_BYTES - len(decision.model_dump_json().encode())
    return Status(
        observed_generation=100,
        replicas=replicas,
        ready_replicas=replicas,
        selector="kvpilot.io/name=chat",
        config=ConfigStatus(
            generation=1000, hash="0123abcd", effective=effective_config({}), overlay=overlay_status(state)
        ),
        objectives=tuple(
            ObjectiveStatus(name=name, state="Infeasible", since=NOW) for name in OBJECTIVE_KINDS
        ),
        tuning=tuning_status(state),
        decisions=(decision.model_copy(update={"summary": "x" * room}),) * MAX_DECISIONS,
        overrides=("chat-approve-d-0042-x7k2p",) * MAX_HANDLED,
        conditions=tuple(
            ConditionStatus(
                type=kind,
                status="False",
                reason="TooLittleExposure",
                message=SENTENCE,
                last_transition_time=NOW,
            )
            for kind in CONDITION_TYPES
        ),
    )


def status_of_long_names(replicas: int) -> Status:
    """Everything at its maximum, pods with names of 253 characters, and messages that list all of them."""
    pod = ReplicaRef(POD.uid, "p" * 253)
    listed = ", ".join(f"{pod.name}: its admin API does not answer" for _ in range(replicas))
    full, state = full_status(replicas), full_state(replicas)
    assert state.change is not None
    controls = (pod,) * min(replicas - 1, MAX_CONTROLS)
    wide = replace(state.change, canary=pod, controls=controls, widened=controls, why=listed)
    state = replace(state, change=wide, holds=(Hold("EngineUnreachable", listed, NOW),) * MAX_HOLDS)
    conditions = tuple(
        item.model_copy(update={"message": listed[:MESSAGE_LIMIT]}) for item in full.conditions
    )
    return full.model_copy(update={"tuning": tuning_status(state), "conditions": conditions})


def test_a_status_of_200_replicas_with_long_names_is_small() -> None:
    full = status_of_long_names(200)
    made = fitted(full)
    document = encode_status(made)
    assert size(document) <= STATUS_BYTES, {name: size(part) for name, part in document.items()}
    assert made.decisions and made.tuning is not None and full.tuning is not None
    change, whole = made.tuning.change, full.tuning.change
    assert change is not None and whole is not None
    assert [item.uid for item in change.controls] == [item.uid for item in whole.controls]
    assert change.canary is not None and change.canary.name.endswith("p…")
    assert fitted(made) is made


def size(part: Any) -> int:
    return len(json.dumps(part, separators=(",", ":")).encode())


@pytest.mark.parametrize("replicas", [3, 200])
def test_a_status_with_everything_at_its_maximum_is_small(replicas: int) -> None:
    full = full_status(replicas)
    made = fitted(full)
    document = encode_status(made)
    sizes = {name: size(part) for name, part in document["tuning"].items()}
    assert size(document) <= STATUS_BYTES, {name: size(part) for name, part in document.items()} | sizes
    assert made.decisions == full.decisions[-len(made.decisions) :] != ()
    assert made.tuning is not None and full.tuning is not None
    kept = made.tuning.generations
    assert kept == full.tuning.generations[-len(kept) :]
    assert len(kept) >= KEPT_GENERATIONS
    assert fitted(made) is made, "nothing more is dropped from what was written"


def test_a_status_of_the_usual_size_keeps_everything() -> None:
    full = full_status(3)
    assert full.tuning is not None
    usual = full.model_copy(
        update={
            "tuning": full.tuning.model_copy(
                update={"blocked_values": (), "reversals": (), "reported": (), "spent": (), "pending": ()}
            ),
            "conditions": full.conditions[:6],
            "decisions": full.decisions[:6],
        }
    )
    assert fitted(usual) is usual
