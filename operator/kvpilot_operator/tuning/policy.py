"""Policy: what the spec means, with its profile, bounds, mode and pace resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kvpilot_operator.tuning.observation import Signal
from kvpilot_operator.tuning.pace import Pace

Mode = Literal["Off", "Recommend", "Approve", "Auto"]


@dataclass(frozen=True)
class Objectives:
    """Targets. Latency edges in s with the attainment that each must reach; the others are ratios.

    Attributes:
        latency: name (p50, p95, p99) -> (edge in s, required attainment).
        throughput, floor: completed requests/s of the whole deployment, judged while as many are offered.
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
    """Bounds of one knob (camelCase name) for this resource; ``tune`` False excludes it.

    ``direction`` says which way kvpilot may change it by itself.
    """

    knob: str
    minimum: float | None
    maximum: float | None
    tune: bool = True
    direction: Literal["Both", "UpOnly", "DownOnly"] = "Both"


@dataclass(frozen=True)
class Window:
    """A time that recurs: from each start by a cron schedule in a time zone, for ``duration`` s."""

    schedule: str
    duration: float
    zone: str = "UTC"


@dataclass(frozen=True)
class ScheduledBounds:
    """Bounds of the number of replicas while a window is open: a raised minimum, another maximum."""

    window: Window
    minimum: int
    maximum: int | None = None


@dataclass(frozen=True)
class Scaling:
    """Bounds within which kvpilot chooses the number of replicas.

    Attributes:
        gpu_limit: replicas that the budget of GPUs allows; None without one.
        gpus: those of one replica.
        limited_by: why the maximum is lower than the one given; "" where it is not.
    """

    minimum: int
    maximum: int
    direction: Literal["Both", "OutOnly", "InOnly"] = "Both"
    schedules: tuple[ScheduledBounds, ...] = ()
    gpu_limit: int | None = None
    limited_by: str = ""
    gpus: int = 0


@dataclass(frozen=True)
class Policy:
    """Everything that ``decide`` must obey. ``scaling`` is None where ``spec.replicas`` fixes the number.

    ``stretched``: factor on all durations, where the source scrapes too seldom for the pace.
    ``restarts_per_day`` and ``cache_lost_per_day`` (bytes) bound what changes may cost; None does not.
    ``maintenance``: experiments begin only while one of these windows is open; () for at any time.
    """

    objectives: Objectives
    mode: Mode
    pace: Pace
    bounds: Mapping[str, KnobBounds]
    scaling: Scaling | None
    disabled_rules: frozenset[str] = frozenset()
    single_replica: Literal["Recommend", "BeforeAfter"] = "Recommend"
    reversals_per_knob_6h: int = 2
    stretched: float = 1.0
    recycle_outliers: bool = False
    maintenance: tuple[Window, ...] = ()
    restarts_per_day: int | None = None
    cache_lost_per_day: int | None = None

    @property
    def acts(self) -> bool:
        """True if kvpilot makes changes, with or without an approval."""
        return self.mode in {"Approve", "Auto"}
