"""The tuner's state, to the status and back without loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args

import structlog
from pydantic import ValidationError

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_operator.spec import status_model as model
from kvpilot_operator.spec.times import from_rfc3339, to_rfc3339
from kvpilot_operator.tuning.state import (
    Barred,
    Change,
    Hold,
    KnobChange,
    Measure,
    OverlayEntry,
    ReplicaMark,
    Reversal,
    Told,
    TuningState,
)

log = structlog.get_logger(__name__)

_FIELDS = {info.alias or name: info for name, info in KVCacheConfig.model_fields.items()}


def value_text(value: Any) -> str:
    """A knob's value as the status spells it: text as it is, others as JSON, e.g. ``"16"``."""
    return str(value) if isinstance(value, str) else json.dumps(value)


def value_of(knob: str, text: str) -> Any:
    """The inverse: the type comes from the field of KVCacheConfig (camelCase ``knob``).

    Raises:
        ValueError: the text is no value of that type.
    """
    if _is_text(knob) and text != "null":
        return text
    return json.loads(text)


def _is_text(knob: str) -> bool:
    annotation: Any = _FIELDS[knob].annotation if knob in _FIELDS else str
    kinds = get_args(annotation) or (annotation,)
    return any(isinstance(kind, str) or (isinstance(kind, type) and issubclass(kind, str)) for kind in kinds)


def state_from_status(status: Mapping[str, Any]) -> TuningState:
    """What the tuner remembers. A status that is empty or cannot be read gives a fresh state.

    The state machine then goes on from the owned ConfigMap with one full cooldown.
    """
    try:
        tuning = model.TuningStatus.model_validate(status.get("tuning") or {})
        config = model.ConfigStatus.model_validate(status.get("config") or {})
        return _state(tuning, config.overlay)
    except (ValidationError, ValueError, TypeError) as error:
        log.warning("status_unreadable", error=str(error).replace("\n", " "))
        return TuningState()


def _state(tuning: model.TuningStatus, overlay: tuple[model.OverlayStatus, ...]) -> TuningState:
    return TuningState(
        phase=tuning.state,
        epoch=tuning.epoch,
        last_generation=tuning.last_generation,
        next_decision=tuning.next_decision,
        overlay=tuple(
            OverlayEntry(o.knob, value_of(o.knob, o.based_on), value_of(o.knob, o.value), o.decision)
            for o in overlay
        ),
        change=None if tuning.change is None else _change(tuning.change),
        cooldown_until=0.0 if tuning.cooldown_until is None else from_rfc3339(tuning.cooldown_until),
        holds=tuple(Hold(h.reason, h.message, from_rfc3339(h.since)) for h in tuning.holds),
        barred=tuple(Barred(b.knob, value_of(b.knob, b.value), from_rfc3339(b.until)) for b in tuning.barred),
        reversals=tuple(Reversal(r.knob, from_rfc3339(r.at)) for r in tuning.reversals),
        scale_down=tuple(ReplicaMark(from_rfc3339(m.at), m.replicas) for m in tuning.scale_down_max),
        met_ticks=tuning.met_ticks,
        told=tuple(Told(t.key, from_rfc3339(t.at)) for t in tuning.told),
        boosted=tuning.boosted,
    )


def _change(change: model.ChangeStatus) -> Change:
    return Change(
        id=change.id,
        rule=change.rule,
        values=tuple(
            KnobChange(v.knob, value_of(v.knob, v.before), value_of(v.knob, v.after))
            for v in (*change.leading, *change.also)
        ),
        epoch=change.epoch,
        generation=change.generation,
        started_at=from_rfc3339(change.started_at),
        phase_since=from_rfc3339(change.phase_since),
        canary_uid=change.canary_uid,
        control_uids=change.control_uids,
        restarts=change.restarts,
        objective=change.objective,
        predicted_gain=float(change.predicted_gain),
        verdict=change.verdict,
        before=tuple(Measure(m.name, float(m.bad), float(m.of)) for m in change.measured_before),
        why=change.why,
    )


def tuning_status(state: TuningState) -> model.TuningStatus:
    """``status.tuning`` of a state: the newest entries where there are more than the status keeps."""
    return model.TuningStatus(
        state=state.phase,
        epoch=state.epoch,
        last_generation=state.last_generation,
        next_decision=state.next_decision,
        met_ticks=state.met_ticks,
        change=None if state.change is None else _change_status(state.change),
        cooldown_until=to_rfc3339(state.cooldown_until) if state.cooldown_until else None,
        holds=tuple(
            model.HoldStatus(reason=h.reason, message=h.message, since=to_rfc3339(h.since))
            for h in state.holds[: model.MOST_HOLDS]
        ),
        barred=tuple(
            model.BarredStatus(knob=b.knob, value=value_text(b.value), until=to_rfc3339(b.until))
            for b in state.barred[-model.MOST_BARRED :]
        ),
        reversals=tuple(
            model.ReversalStatus(knob=r.knob, at=to_rfc3339(r.at))
            for r in state.reversals[-model.MOST_REVERSALS :]
        ),
        scale_down_max=tuple(
            model.MarkStatus(at=to_rfc3339(m.at), replicas=m.replicas)
            for m in state.scale_down[-model.MOST_MARKS :]
        ),
        told=tuple(model.ToldStatus(key=t.key, at=to_rfc3339(t.at)) for t in state.told[-model.MOST_TOLD :]),
        boosted=state.boosted,
    )


def overlay_status(overlay: tuple[OverlayEntry, ...]) -> tuple[model.OverlayStatus, ...]:
    """``status.config.overlay`` of a state."""
    return tuple(
        model.OverlayStatus(
            knob=o.knob,
            based_on=value_text(o.based_on),
            value=value_text(o.value),
            decision=o.decision,
        )
        for o in overlay
    )


def _change_status(change: Change) -> model.ChangeStatus:
    leading, *others = (
        model.CompanionStatus(knob=v.knob, before=value_text(v.before), after=value_text(v.after))
        for v in change.values
    )
    return model.ChangeStatus(
        id=change.id,
        rule=change.rule,
        knob=leading.knob,
        before=leading.before,
        after=leading.after,
        also=tuple(others),
        epoch=change.epoch,
        generation=change.generation,
        started_at=to_rfc3339(change.started_at),
        phase_since=to_rfc3339(change.phase_since),
        canary_uid=change.canary_uid,
        control_uids=change.control_uids,
        restarts=change.restarts,
        objective=change.objective,
        predicted_gain=repr(change.predicted_gain),
        verdict=change.verdict,
        measured_before=tuple(
            model.MeasureStatus(name=m.name, bad=repr(m.bad), of=repr(m.of)) for m in change.before
        ),
        why=change.why,
    )
