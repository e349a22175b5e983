"""The one codec between JSON, the typed status, and the tuner's state. Fields are matched by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, get_args, get_type_hints

import structlog
from pydantic import BaseModel, ValidationError

from kvpilot_operator.status import model
from kvpilot_operator.tuning.state import TuningState

log = structlog.get_logger(__name__)


def decode_status(document: Mapping[str, Any] | None) -> model.Status:
    """The typed status of a JSON document. One that cannot be read is lost.

    The tuner then starts afresh from the owned ConfigMap, after one full cooldown.
    """
    try:
        return model.Status.model_validate(document or {})
    except ValidationError as error:
        log.warning("status_unreadable", error=str(error).replace("\n", " "))
        return model.Status()


def encode_status(status: model.Status) -> dict[str, Any]:
    """The JSON document of a typed status, without empty fields."""
    return dict(_without_empty(status.model_dump(by_alias=True, mode="json")))


def fitted(status: model.Status) -> model.Status:
    """The status within ``STATUS_BYTES``: without its oldest decisions, then without its oldest generations.

    Whole records are in the ConfigMap of decisions, so little is lost. If that is not enough, as where long
    names of many replicas are listed, texts are cut as little as suffices.
    """
    excess = _size(encode_status(status)) - model.STATUS_BYTES
    if excess <= 0:
        return status
    decisions, tuning = status.decisions, status.tuning
    while excess > 0 and len(decisions) > 1:
        excess -= _size(decisions[0].model_dump(by_alias=True, mode="json"))
        decisions = decisions[1:]
    generations = tuning.generations if tuning is not None else ()
    while excess > 0 and len(generations) > model.KEPT_GENERATIONS:
        excess -= _size(generations[0].model_dump(by_alias=True, mode="json"))
        generations = generations[1:]
    if tuning is not None:
        tuning = tuning.model_copy(update={"generations": generations})
    status = status.model_copy(update={"decisions": decisions, "tuning": tuning})
    for limit in model.TEXT_LIMITS:
        if _size(encode_status(status)) <= model.STATUS_BYTES:
            break
        status = _cut(status, limit)
    return status


CUT = frozenset({"name", "message", "why"})
"""Fields of texts for people; what is identified has a UID or a reason beside it."""


def _cut(value: Any, limit: int) -> Any:
    """A status, or a part of it, whose texts for people have so many characters at most."""
    if isinstance(value, tuple):
        return tuple(_cut(item, limit) for item in value)
    if not isinstance(value, BaseModel):
        return value
    changed = {
        name: f"{item[: limit - 1]}…"
        if name in CUT and isinstance(item, str) and len(item) > limit
        else _cut(item, limit)
        for name in type(value).model_fields
        if (item := getattr(value, name)) is not None
    }
    return value.model_copy(update=changed)


def _size(document: Any) -> int:
    return len(json.dumps(document, separators=(",", ":")).encode())


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items() if item is not None and item != []}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


def state_of(status: model.Status) -> TuningState:
    """The tuner's state that a status holds."""
    tuning, config = status.tuning or model.TuningStatus(), status.config or model.ConfigStatus()
    state: TuningState = _from_model(TuningState, tuning)
    overlay = _from_model(_hints(TuningState)["overlay"], config.overlay)
    return replace(state, overlay=overlay)


def tuning_status(state: TuningState) -> model.TuningStatus:
    """``status.tuning`` of a state."""
    return model.TuningStatus.model_validate(state, from_attributes=True)


def overlay_status(state: TuningState) -> tuple[model.OverlayStatus, ...]:
    """``status.config.overlay`` of a state."""
    return tuple(model.OverlayStatus.model_validate(entry, from_attributes=True) for entry in state.overlay)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)  # parses annotations anew at each call


def _from_model(kind: Any, value: Any) -> Any:
    """Rebuild the dataclasses of ``kind`` from status models with the same field names."""
    if isinstance(value, tuple):
        return tuple(_from_model(get_args(kind)[0], item) for item in value)
    if isinstance(value, BaseModel):
        target: Any = next(arm for arm in (kind, *get_args(kind)) if is_dataclass(arm))
        hints = _hints(target)
        names = [field.name for field in fields(target) if field.name in type(value).model_fields]
        return target(**{name: _from_model(hints[name], getattr(value, name)) for name in names})
    return 0.0 if value is None and kind is float else value  # a time that the status leaves out
