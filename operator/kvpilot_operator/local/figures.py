"""A run as plain data, for ``--json`` and the HTML report."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvpilot_operator.load.results import OK
from kvpilot_operator.local.recorder import Point
from kvpilot_operator.local.session import RunResult
from kvpilot_operator.resource.model import KVCacheDeployment
from kvpilot_operator.tuning.decision import Record


def figures_of(resource: KVCacheDeployment, result: RunResult) -> dict[str, Any]:
    """All figures of a run; times are s from its start, except ``started``, which is s since the epoch."""
    start = result.started
    check = result.check
    policy = result.policy
    assert policy is not None
    return {
        "name": resource.metadata.name,
        "namespace": resource.metadata.namespace,
        "started": start,
        "seconds": round(result.ended - start, 3),
        "model": resource.spec.engine.model.source,
        "profile": result.profile,
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
        "check": None
        if check is None
        else {
            "cured": check.cured,
            "reason": check.reason,
            "steps": [
                {"name": s.name, "at": None if s.at is None else round(s.at - start, 2), "message": s.message}
                for s in check.steps
            ],
        },
        "load": result.load,
        "requests": [
            [round(r.at + result.load_started - start, 2), round(r.seconds, 4)]
            for r in result.results
            if result.load_started is not None and r.kind == OK
        ],
        "records": [_record(record, start) for record in result.records],
        "reconciles_per_point": result.reconciles_per_point,
        "points": [_point(point, start) for point in result.points],
    }


def _record(record: Record, start: float) -> dict[str, Any]:
    plain: dict[str, Any] = dataclasses.asdict(record)
    return {**plain, "at": round(record.at - start, 2)}


def _point(point: Point, start: float) -> dict[str, Any]:
    plain: dict[str, Any] = dataclasses.asdict(point)
    return {**plain, "at": round(point.at - start, 2)}
