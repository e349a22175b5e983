"""The status of a resource: made from what was observed and decided, and read back into the tuner's state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract.config import QUIET
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.status import model
from kvpilot_operator.status.codec import fitted, overlay_status, tuning_status
from kvpilot_operator.status.conditions import (
    NOTHING_JUDGED,
    conditions_of,
    dated,
    invalid_spec,
    same_but_for_figures,
)
from kvpilot_operator.status.snapshot import Snapshot
from kvpilot_operator.tuning.configuration import DEFAULTS
from kvpilot_operator.tuning.decision import Decision, Objective, Record
from kvpilot_operator.tuning.observation import Observation, Promoted
from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.state import TuningState


def selector_of(name: str) -> str:
    """``status.selector``: the label selector of a resource's pods."""
    return f"kvpilot.io/name={name}"


def status_of(
    snapshot: Snapshot, policy: Policy, observation: Observation, decision: Decision
) -> model.Status:
    """The status after a decision; equal to ``snapshot.status`` when nothing that it holds has changed."""
    before, resource = snapshot.status, snapshot.resource
    replicas = [replica for replica in snapshot.replicas if not replica.terminating]
    generation = resource.metadata.generation
    found = conditions_of(snapshot, policy, observation, decision)
    if before.condition(NOTHING_JUDGED.type) is None:
        found.insert(0, NOTHING_JUDGED)
    return fitted(
        model.Status(
            observed_generation=generation,
            replicas=len(replicas),
            ready_replicas=sum(replica.ready for replica in replicas),
            selector=selector_of(snapshot.key.name),
            config=_config(observation.promoted, decision.state) or before.config,
            objectives=_objectives(decision.objectives, before, observation.at),
            tuning=_with_old_messages(tuning_status(decision.state), before.tuning),
            decisions=_decisions(decision.records, before),
            overrides=snapshot.overrides.names,
            conditions=dated(found, before.conditions, generation, observation.at),
        )
    )


def invalid_status(snapshot: Snapshot, error: ManifestError, now: float) -> model.Status:
    """The status of a resource that never had a valid spec: as it was, except for one condition."""
    generation = snapshot.spec_generation
    invalid = invalid_spec("; ".join(error.lines), generation)
    conditions = dated([invalid], snapshot.status.conditions, generation, now)
    return snapshot.status.model_copy(update={"conditions": conditions})


def _config(promoted: Promoted | None, state: TuningState) -> model.ConfigStatus | None:
    if promoted is None:
        return None
    effective = effective_config(promoted.config)
    digest = hashlib.sha256(json.dumps(effective, sort_keys=True).encode()).hexdigest()[:8]
    return model.ConfigStatus(
        generation=promoted.generation,
        hash=digest,
        effective=effective,
        overlay=overlay_status(state),
    )


def restored_config(status: model.Status, base: Mapping[str, Any]) -> Promoted | None:
    """The promoted configuration that a status shows; None if it shows none.

    Defaults that neither the base nor the overlay names are left out, as they are in what was promoted.
    """
    config = status.config
    if config is None or config.generation is None or config.effective is None:
        return None
    named = {*base, *(entry.knob for entry in config.overlay)}
    found: dict[str, Any] = {name: None for name in base if name not in config.effective}
    found |= {
        name: item for name, item in config.effective.items() if name in named or item != DEFAULTS.get(name)
    }
    return Promoted(config.generation, found)


def effective_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with every default filled in, camelCase."""
    try:
        config = KVCacheConfig.model_validate(dict(given), context=QUIET)
    except ValidationError:  # written by another version: what is there is still the truth
        return dict(given)
    return config.model_dump(by_alias=True, exclude_none=True, mode="json")


def _objectives(
    objectives: tuple[Objective, ...], before: model.Status, now: float
) -> tuple[model.ObjectiveStatus, ...]:
    since = {(item.name, item.state): item.since for item in before.objectives}
    return tuple(
        model.ObjectiveStatus(
            name=item.name, state=item.state, since=since.get((item.name, item.state), int(now))
        )
        for item in objectives
    )


def _with_old_messages(tuning: model.TuningStatus, before: model.TuningStatus | None) -> model.TuningStatus:
    """Keep the message of a hold that goes on while only figures in it changed."""
    old = {item.reason: item.message for item in before.holds} if before is not None else {}

    def kept(hold: model.HoldStatus) -> model.HoldStatus:
        message = old.get(hold.reason, "")
        same = same_but_for_figures(message, hold.message)
        return hold.model_copy(update={"message": message}) if same else hold

    return tuning.model_copy(update={"holds": tuple(kept(hold) for hold in tuning.holds)})


def _decisions(records: tuple[Record, ...], before: model.Status) -> tuple[model.DecisionStatus, ...]:
    known = {(item.id, item.outcome) for item in before.decisions}
    new = [_summary(record) for record in records if (record.id, record.outcome) not in known]
    return (*before.decisions, *new)[-model.MAX_DECISIONS :]


def _summary(record: Record) -> model.DecisionStatus:
    entry = model.DecisionStatus(
        id=record.id,
        at=record.at,
        rule=record.rule,
        outcome=record.outcome,
        summary=record.summary,
        verdict=record.evidence.get("verdict"),
    )
    excess = len(entry.model_dump_json().encode()) - model.DECISION_BYTES
    if excess <= 0:
        return entry
    # Cut by bytes of the escaped text at most, so the entry always fits; an ellipsis shows that it was cut.
    short = record.summary.encode()[: -(excess + 3)].decode(errors="ignore")
    return entry.model_copy(update={"summary": short + "…"})
