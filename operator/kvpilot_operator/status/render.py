"""The status of a resource: made from what was observed and decided, and read back into the tuner's state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract.config import QUIET
from kvpilot_operator.ports import Snapshot
from kvpilot_operator.spec import status_model as model
from kvpilot_operator.spec.conditions import (
    NOTHING_JUDGED,
    Condition,
    conditions_of,
    dated,
    refused,
    same_but_for_figures,
)
from kvpilot_operator.spec.errors import ManifestError
from kvpilot_operator.spec.memory import overlay_status, state_from_status, tuning_status
from kvpilot_operator.spec.models import KVCacheDeployment
from kvpilot_operator.spec.times import to_rfc3339
from kvpilot_operator.tuning.decision import Decision, Objective, Record
from kvpilot_operator.tuning.observation import Observation, Promoted
from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.state import OverlayEntry

__all__ = ["invalid_status", "selector_of", "state_from_status", "status_of"]


def selector_of(name: str) -> str:
    """``status.selector``: the label selector of a resource's pods."""
    return f"kvpilot.io/name={name}"


def status_of(  # noqa: PLR0917 - all that a look knows, in the order in which it became known
    snapshot: Snapshot,
    resource: KVCacheDeployment,
    policy: Policy,
    observation: Observation,
    decision: Decision,
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole status after a decision; equal to ``before`` when nothing changed that it tells of."""
    pods = [pod for pod in snapshot.pods if not pod.terminating]
    generation = resource.metadata.generation
    status = model.Status(
        observed_generation=generation,
        replicas=len(pods),
        ready_replicas=sum(pod.ready for pod in pods),
        selector=selector_of(snapshot.key.name),
        config=_config(observation.promoted, decision.state.overlay),
        objectives=_objectives(decision.objectives, before, observation.at),
        tuning=_with_old_messages(tuning_status(decision.state), before),
        decisions=_decisions(decision.records, before),
        overrides=snapshot.overrides,
    )
    known = before.get("conditions", ())
    told = conditions_of(snapshot, resource.spec, policy, observation, decision)
    if not any(item["type"] == NOTHING_JUDGED.type for item in known):
        told.insert(0, NOTHING_JUDGED)
    return _written(status, dated(told, known, generation, observation.at))


def invalid_status(snapshot: Snapshot, error: ManifestError, now: float) -> dict[str, Any]:
    """The status of a resource whose spec cannot be used: as it was, but for one condition.

    ``observedGeneration`` stays at the last spec in use; the condition carries that of the refused one.
    """
    before = dict(snapshot.manifest.get("status") or {})
    generation = int(snapshot.manifest.get("metadata", {}).get("generation") or 0)
    told: list[Condition] = [refused(error)]
    return {**before, "conditions": dated(told, before.get("conditions", ()), generation, now)}


def _written(status: model.Status, conditions: list[dict[str, Any]]) -> dict[str, Any]:
    plain = status.model_dump(by_alias=True, exclude_none=True, mode="json")
    return {**_without_empty(plain), "conditions": conditions}


def _without_empty(value: Any) -> Any:
    """Leave out empty lists, which tell nothing."""
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items() if item != []}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


def _config(promoted: Promoted | None, overlay: tuple[OverlayEntry, ...]) -> model.ConfigStatus | None:
    if promoted is None:
        return None
    effective = effective_config(promoted.config)
    digest = hashlib.sha256(json.dumps(effective, sort_keys=True).encode()).hexdigest()[:8]
    return model.ConfigStatus(
        generation=promoted.generation,
        hash=digest,
        effective=effective,
        overlay=overlay_status(overlay),
    )


def effective_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with every default filled in, camelCase."""
    try:
        config = KVCacheConfig.model_validate(dict(given), context=QUIET)
    except ValidationError:  # written by another version: what is there is still the truth
        return dict(given)
    return config.model_dump(by_alias=True, exclude_none=True, mode="json")


def _objectives(
    objectives: tuple[Objective, ...], before: Mapping[str, Any], now: float
) -> tuple[model.ObjectiveStatus, ...]:
    known = {item["name"]: item for item in before.get("objectives", ())}

    def since(item: Objective) -> str:
        old = known.get(item.name, {})
        return str(old["since"]) if old.get("state") == item.state else to_rfc3339(int(now))

    return tuple(
        model.ObjectiveStatus(name=item.name, state=item.state, since=since(item)) for item in objectives
    )


def _with_old_messages(tuning: model.TuningStatus, before: Mapping[str, Any]) -> model.TuningStatus:
    """Holds that go on keep their sentence while only figures in it changed."""
    old = {item["reason"]: item for item in (before.get("tuning") or {}).get("holds", ())}

    def kept(hold: model.HoldStatus) -> model.HoldStatus:
        message = str(old.get(hold.reason, {}).get("message", ""))
        return (
            hold.model_copy(update={"message": message})
            if same_but_for_figures(message, hold.message)
            else hold
        )

    return tuning.model_copy(update={"holds": tuple(kept(hold) for hold in tuning.holds)})


def _decisions(records: tuple[Record, ...], before: Mapping[str, Any]) -> tuple[model.DecisionStatus, ...]:
    old = [model.DecisionStatus.model_validate(item) for item in before.get("decisions", ())]
    told = {(item.id, item.outcome) for item in old}
    new = [_summary(record) for record in records if (record.id, record.outcome) not in told]
    return tuple([*old, *new][-model.MOST_DECISIONS :])


def _summary(record: Record) -> model.DecisionStatus:
    entry = model.DecisionStatus(
        id=record.id,
        at=to_rfc3339(record.at),
        rule=record.rule,
        outcome=record.outcome,
        summary=record.summary,
    )
    excess = len(entry.model_dump_json().encode()) - model.DECISION_BYTES
    if excess <= 0:
        return entry
    # Cut by bytes of the escaped text at most, so the entry always fits; an ellipsis tells that it was cut.
    short = record.summary.encode()[: -(excess + 3)].decode(errors="ignore")
    return entry.model_copy(update={"summary": short + "…"})
