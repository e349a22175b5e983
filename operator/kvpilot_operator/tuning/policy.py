"""What the user asked for, resolved: profile, overrides of it, bounds, mode and pace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvpilot_operator.tuning.observation import Signal
from kvpilot_operator.tuning.pace import Pace

Mode = Literal["Off", "Recommend", "Auto"]


@dataclass(frozen=True)
class Objectives:
    """Limits. Latency in s at published edges with the attainment each must reach; the rest are ratios.

    Attributes:
        latency: name (p50, p95, p99) -> (edge in s, required attainment).
        throughput, floor: completed requests/s of the whole deployment, judged only while offered.
    """

    signal: Signal
    latency: Mapping[str, tuple[float, float]]
    throughput: float
    floor: float
    hit_rate: float
    memory: float
    errors: float


@dataclass(frozen=True)
class KnobBounds:
    """Bounds of one knob (camelCase name) for this resource; ``tune`` False excludes it."""

    knob: str
    minimum: float | None
    maximum: float | None
    tune: bool = True


@dataclass(frozen=True)
class Scaling:
    """Bounds of the number of replicas that kvpilot chooses."""

    minimum: int
    maximum: int
    direction: Literal["Both", "OutOnly", "InOnly"] = "Both"


@dataclass(frozen=True)
class Policy:
    """Everything that ``decide`` must obey. ``scaling`` is None when somebody else chooses replicas."""

    objectives: Objectives
    mode: Mode
    pace: Pace
    bounds: Mapping[str, KnobBounds]
    scaling: Scaling | None
    disabled_rules: frozenset[str] = frozenset()
    single_replica: Literal["Recommend", "BeforeAfter"] = "Recommend"
    reversals_per_knob_6h: int = 2
    defaults: Mapping[str, Any] | None = None
