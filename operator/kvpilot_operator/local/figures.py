"""A run as plain data: what ``--json`` writes and the report draws."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvpilot_operator.load.results import OK
from kvpilot_operator.local.recorder import Point
from kvpilot_operator.local.session import Outcome
from kvpilot_operator.spec.models import KVCacheDeployment
from kvpilot_operator.tuning.decision import Record


def figures_of(resource: KVCacheDeployment, outcome: Outcome) -> dict[str, Any]:
    """Everything about a run; times are s from its start."""
    start = outcome.started
    verdict = outcome.verdict
    policy = outcome.policy
    assert policy is not None
    return {
        "name": resource.metadata.name,
        "namespace": resource.metadata.namespace,
        "started": start,
        "seconds": round(outcome.ended - start, 3),
        "model": resource.spec.engine.model.source,
        "profile": outcome.profile,
        "mode": policy.mode,
        "signal": policy.objectives.signal,
        "objectives": {
            "latency": {
                name: {"edge_s": e, "required": r} for name, (e, r) in policy.objectives.latency.items()
            },
            "throughput": policy.objectives.throughput,
            "hit_rate": policy.objectives.hit_rate,
            "memory": policy.objectives.memory,
            "errors": policy.objectives.errors,
        },
        "verdict": None
        if verdict is None
        else {
            "cured": verdict.cured,
            "reason": verdict.reason,
            "steps": [
                {"name": s.name, "at": None if s.at is None else round(s.at - start, 2), "message": s.message}
                for s in verdict.steps
            ],
        },
        "load": outcome.load,
        "requests": [
            [round(r.at + outcome.load_started - start, 2), round(r.seconds, 4)]
            for r in outcome.results
            if outcome.load_started is not None and r.kind == OK
        ],
        "records": [_record(record, start) for record in outcome.records],
        "looks_per_point": outcome.looks_per_point,
        "points": [_point(point, start) for point in outcome.points],
    }


def _record(record: Record, start: float) -> dict[str, Any]:
    plain: dict[str, Any] = dataclasses.asdict(record)
    return {**plain, "at": round(record.at - start, 2)}


def _point(point: Point, start: float) -> dict[str, Any]:
    plain: dict[str, Any] = dataclasses.asdict(point)
    return {**plain, "at": round(point.at - start, 2)}
