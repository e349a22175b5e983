"""What was measured: one immutable input for everything that is decided.

Gathered by the loop from the ports; nothing in this package performs I/O or reads a clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

Signal = Literal["request", "firstToken"]


@dataclass(frozen=True)
class Counts:
    """Increases of one engine's counters over a window, or of several engines' (``total``).

    Attributes:
        pod_seconds: time covered, summed over engines, s.
        arrivals: requests that came in.
        outcomes: requests that ended, by ``Outcome`` value.
        request_within, first_token_within: successful requests at or under each published edge (s).
        stage_seconds: time spent, by ``Stage`` value, of requests that ended.
        query_tokens, hit_tokens, ceiling_tokens: prompt tokens looked up, served from any tier, and what an
            infinite cache would have served; host_hit_tokens are those of the host tier.
        prefetch_used, prefetch_wasted: blocks.
        encode_seconds, decode_seconds: work of the codecs, off the stepping thread.
        busy_seconds, steps, step_rows: stepping time, steps, and the sum of rows over steps.
    """

    pod_seconds: float = 0.0
    arrivals: float = 0.0
    outcomes: Mapping[str, float] = field(default_factory=dict)
    request_within: Mapping[float, float] = field(default_factory=dict)
    first_token_within: Mapping[float, float] = field(default_factory=dict)
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    query_tokens: float = 0.0
    hit_tokens: float = 0.0
    host_hit_tokens: float = 0.0
    ceiling_tokens: float = 0.0
    output_tokens: float = 0.0
    evicted_pages: float = 0.0
    preemptions: float = 0.0
    prefetch_used: float = 0.0
    prefetch_wasted: float = 0.0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    busy_seconds: float = 0.0
    steps: float = 0.0
    step_rows: float = 0.0

    @staticmethod
    def total(engines: Iterable[Counts]) -> Counts:
        """Of several engines together."""
        parts = tuple(engines)
        sums: dict[str, Any] = {name: sum((getattr(part, name) for part in parts), 0.0) for name in _NUMBERS}
        for name in _BY_KEY:
            by_key: dict[Any, float] = {}
            for part in parts:
                for key, number in getattr(part, name).items():
                    by_key[key] = by_key.get(key, 0.0) + number
            sums[name] = by_key
        return Counts(**sums)

    @property
    def judged(self) -> float:
        """Requests that an objective judges: finished, shed, failed or timed out; not the client's doing."""
        return sum(self.outcomes.get(name, 0.0) for name in ("ok", "shed", "timeout", "error"))

    @property
    def completed(self) -> float:
        """Successful requests."""
        return self.outcomes.get("ok", 0.0)

    @property
    def failed(self) -> float:
        """Shed, failed and timed out requests."""
        return self.judged - self.completed

    def attainment(self, signal: Signal, edge_s: float) -> float | None:
        """Good / judged at a published edge; None where nothing was judged."""
        within = self.request_within if signal == "request" else self.first_token_within
        return within.get(edge_s, 0.0) / self.judged if self.judged else None


_BY_KEY = tuple(item.name for item in fields(Counts) if item.default_factory is dict)
_NUMBERS = tuple(item.name for item in fields(Counts) if item.name not in _BY_KEY)


@dataclass(frozen=True)
class Gauges:
    """Last values of one engine. ``memory_limit_bytes`` belongs to ``memory_ratio``; 0 when it is unknown."""

    waiting: float = 0.0
    running: float = 0.0
    memory_ratio: float = 0.0
    marginal_gain: float = 1.0
    cached_bytes: float = 0.0
    budget_bytes: float = 0.0
    generation: int = 0
    memory_limit_bytes: float = 0.0


@dataclass(frozen=True)
class Sample:
    """One engine's metrics: counts by window name (``short``, ``long``, ``verify``), gauges, and their age.

    ``coverage_s`` is the time that the longest window really covers; a young engine covers less.
    """

    windows: Mapping[str, Counts]
    gauges: Gauges
    age_s: float
    coverage_s: float


@dataclass(frozen=True)
class EngineView:
    """What an engine says of itself (``Engines.describe``). ``config`` is camelCase, as it runs now."""

    instance: str
    generation: int
    epoch: int
    config: Mapping[str, Any]
    converging: bool
    ceilings: Mapping[str, int]


@dataclass(frozen=True)
class Pod:
    """One replica: what the cluster knows, what the engine says, what was measured.

    ``engine`` is None when it could not be asked, ``sample`` when there are no metrics of it.
    """

    uid: str
    name: str
    ready: bool
    terminating: bool = False
    pending_reason: str = ""
    created_at: float = 0.0
    restarts: int = 0
    engine: EngineView | None = None
    sample: Sample | None = None


@dataclass(frozen=True)
class Promoted:
    """The content of the owned ConfigMap: the last known good configuration (camelCase, whole)."""

    generation: int
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Boost:
    """An override in force that raises the minimum of replicas until it expires."""

    name: str
    min_replicas: int
    expires_at: float


@dataclass(frozen=True)
class Observation:
    """Everything a decision may look at.

    Attributes:
        at: time of the observation, s since the epoch (from the injected clock).
        base: the user's KVCacheConfig, camelCase, explicitly given fields only.
        promoted: None before the first configuration was written.
        replicas: what the child workload asks for now.
        replicas_managed_by: another manager that writes the child's replicas; "" when it is only us.
        metrics_problem: why the metrics cannot be trusted as a whole; "" when they can.
        paused_by: name of a pause override in force, "" without one.
        rolling_out: True while the child workload replaces pods.
    """

    at: float
    pods: tuple[Pod, ...]
    base: Mapping[str, Any]
    promoted: Promoted | None
    replicas: int
    replicas_managed_by: str = ""
    metrics_problem: str = ""
    paused_by: str = ""
    boosts: tuple[Boost, ...] = ()
    rolling_out: bool = False
    _totals: dict[tuple[str, frozenset[str] | None], Counts] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """A decision asks for the same sums a dozen times."""

    @property
    def ready(self) -> tuple[Pod, ...]:
        """Pods that serve and are meant to go on serving."""
        return tuple(pod for pod in self.pods if pod.ready and not pod.terminating)

    def counts(self, window: str, uids: frozenset[str] | None = None) -> Counts:
        """Counts of a window over the ready pods (or those of ``uids``) that have a sample."""
        if (window, uids) not in self._totals:
            samples = (pod.sample for pod in self.ready if uids is None or pod.uid in uids)
            windows = (sample.windows.get(window) for sample in samples if sample is not None)
            self._totals[window, uids] = Counts.total(counts for counts in windows if counts is not None)
        return self._totals[window, uids]
