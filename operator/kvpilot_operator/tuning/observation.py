"""Observation: the one immutable input of a decision.

The reconciler gathers it from its ports; this package performs no I/O and reads no clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from operator import attrgetter, methodcaller
from types import MappingProxyType
from typing import Any, Literal

from kvpilot_engine.contract import metrics as names

Signal = Literal["request", "firstToken"]

EngineProblem = Literal["unreachable", "unauthorized", "refused", "stale_epoch"]
"""Why the administration of an engine failed."""


JUDGED = ("ok", "shed", "timeout", "error", "too_large")
"""Outcomes that objectives judge; the client causes the others."""


OPTIONAL_COUNTS: Mapping[str, str] = MappingProxyType(
    {
        "first_token_within": names.FIRST_TOKEN_SECONDS,
        "query_tokens": names.QUERY_TOKENS_TOTAL,
        "hit_tokens": names.HIT_TOKENS_TOTAL,
        "host_hit_tokens": names.HIT_TOKENS_TOTAL,
        "ceiling_tokens": names.CEILING_TOKENS_TOTAL,
        "output_tokens": names.OUTPUT_TOKENS_TOTAL,
        "evicted_pages": names.EVICTED_PAGES_TOTAL,
        "preemptions": names.PREEMPTIONS_TOTAL,
        "prefetch_used": names.PREFETCH_BLOCKS_TOTAL,
        "prefetch_wasted": names.PREFETCH_BLOCKS_TOTAL,
        "encode_seconds": names.CODEC_SECONDS_TOTAL,
        "decode_seconds": names.CODEC_SECONDS_TOTAL,
    }
)
"""Counts that a runtime may not export, and the metric of each. Absent is not zero: such a count is None."""


@dataclass(frozen=True)
class Counts:
    """Increases of the counters of one replica over a window, or of several (``total``).

    Those of ``OPTIONAL_COUNTS`` are None where the runtime, or one of several, does not export them.

    Attributes:
        replica_seconds: time covered, summed over replicas, s.
        arrivals: requests that came in.
        outcomes: requests that ended, by ``Outcome`` value.
        request_within, first_token_within: successful requests at or under each published edge (s).
        stage_seconds: time spent, by ``Stage`` value, of successful requests.
        query_tokens, hit_tokens, ceiling_tokens: prompt tokens looked up, served from any tier, and what an
            infinite cache would have served; host_hit_tokens are those of the host tier.
        prefetch_used, prefetch_wasted: blocks.
        encode_seconds, decode_seconds: work of the codecs, off the stepping thread.
        busy_seconds, steps, step_rows: stepping time, steps, and the sum of rows over steps.
        bucket_rows, bucket_seconds: rows and time by bucket of rows; empty where the runtime has none.
    """

    replica_seconds: float = 0.0
    arrivals: float = 0.0
    outcomes: Mapping[str, float] = field(default_factory=dict)
    request_within: Mapping[float, float] = field(default_factory=dict)
    first_token_within: Mapping[float, float] | None = field(default_factory=dict)
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    query_tokens: float | None = 0.0
    hit_tokens: float | None = 0.0
    host_hit_tokens: float | None = 0.0
    ceiling_tokens: float | None = 0.0
    output_tokens: float | None = 0.0
    evicted_pages: float | None = 0.0
    preemptions: float | None = 0.0
    prefetch_used: float | None = 0.0
    prefetch_wasted: float | None = 0.0
    encode_seconds: float | None = 0.0
    decode_seconds: float | None = 0.0
    busy_seconds: float = 0.0
    steps: float = 0.0
    step_rows: float = 0.0
    bucket_rows: Mapping[int, float] = field(default_factory=dict)
    bucket_seconds: Mapping[int, float] = field(default_factory=dict)

    @staticmethod
    def total(engines: Iterable[Counts]) -> Counts:
        """The sum over several replicas."""
        parts = tuple(engines)
        if not parts:
            return Counts()
        # A decision sums several times for each replica, so the columns are gathered in one call each.
        columns = zip(*map(_numbers, parts), strict=True)
        sums: dict[str, Any] = {
            name: None if None in column else sum(column, 0.0)
            for name, column in zip(_NUMBERS, columns, strict=True)
        }
        for name, mappings in zip(_BY_KEY, zip(*map(_mappings, parts), strict=True), strict=True):
            sums[name] = None if None in mappings else _added(mappings)
        return Counts(**sums)

    @cached_property
    def judged(self) -> float:
        """Requests that objectives judge: they ended well, or failed by no fault of the client.

        A request that the quota of the cache is too small for has failed: another quota would serve it.
        """
        return sum(self.outcomes.get(name, 0.0) for name in JUDGED)

    @property
    def ended(self) -> float:
        """Judged requests that an engine worked on: those that were not refused at once."""
        return self.judged - self.outcomes.get("shed", 0.0) - self.outcomes.get("too_large", 0.0)

    @property
    def errors(self) -> float:
        """Requests that failed by a fault of the engine or by its quota; others are the load's."""
        return self.outcomes.get("error", 0.0) + self.outcomes.get("too_large", 0.0)

    @property
    def admitted(self) -> float:
        """Judged requests that were not shed: only they can fail by a fault of the engine."""
        return self.judged - self.outcomes.get("shed", 0.0)

    def of_any_length(self) -> Counts:
        """The same without requests that a quota is too small for: the client chose how long they are."""
        if not self.outcomes.get("too_large"):
            return self
        return replace(self, outcomes={**self.outcomes, "too_large": 0.0})

    @property
    def completed(self) -> float:
        """Successful requests."""
        return self.outcomes.get("ok", 0.0)

    @property
    def left(self) -> float:
        """Requests that ended by no fault of the load, well or not: others were shed or timed out."""
        return sum(self.outcomes.values()) - sum(self.outcomes.get(name, 0.0) for name in ("shed", "timeout"))

    @property
    def failed(self) -> float:
        """Shed, failed and timed out requests."""
        return self.judged - self.completed

    @property
    def computed(self) -> float | None:
        """Prompt tokens that the cache did not serve; None if the runtime does not say."""
        looked_up, hit = self.query_tokens, self.hit_tokens
        return looked_up - hit if looked_up is not None and hit is not None else None

    def within(self, signal: Signal) -> Mapping[float, float] | None:
        """Successful requests at or under each published edge (s); None if the runtime does not say."""
        return self.request_within if signal == "request" else self.first_token_within

    def attainment(self, signal: Signal, edge_s: float) -> float | None:
        """Share of the judged requests within a published edge (s); None without any."""
        within = self.within(signal)
        return within.get(edge_s, 0.0) / self.judged if within is not None and self.judged else None


_BY_KEY = tuple(item.name for item in fields(Counts) if item.default_factory is dict)
_NUMBERS = tuple(item.name for item in fields(Counts) if item.name not in _BY_KEY)
NO_COUNTS = Counts()
"""Of a window that was not measured."""

_numbers, _mappings, _values = attrgetter(*_NUMBERS), attrgetter(*_BY_KEY), methodcaller("values")


def _added(mappings: Sequence[Mapping[Any, float]]) -> dict[Any, float]:
    """The sum by key. Replicas have the same keys nearly always: then columns are added, as above."""
    keys = tuple(mappings[0])
    if all(tuple(mapping) == keys for mapping in mappings):
        columns = zip(*(mapping.values() for mapping in mappings), strict=True)
        return {key: sum(column, 0.0) for key, column in zip(keys, columns, strict=True)}
    by_key: dict[Any, float] = {}
    for mapping in mappings:
        for key, number in mapping.items():
            by_key[key] = by_key.get(key, 0.0) + number
    return by_key


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one kind: used over its limit, the limit, what the cache holds and may hold there, bytes."""

    ratio: float = 0.0
    limit_bytes: float = 0.0
    cached_bytes: float = 0.0
    budget_bytes: float = 0.0


@dataclass(frozen=True)
class Gauges:
    """Last values of one replica. ``memory_limit_bytes`` belongs to ``memory_ratio``; 0 if it is unknown.

    Attributes:
        host, device: memory by kind; None where the replica has no such memory.
        curve: measured time of a decode step by its rows, s; empty where the runtime has none.
        marginal_gain: throughput that one more row brings, relative; None if the runtime does not say.
        longest_request_tokens: prompt and answer of the longest request within a day; None if the runtime
            does not say.
        token_bytes: bytes of one token in the pool; 0 while it holds none, None if the runtime does not say.
    """

    waiting: float = 0.0
    running: float = 0.0
    memory_ratio: float = 0.0
    marginal_gain: float | None = 1.0
    cached_bytes: float = 0.0
    budget_bytes: float = 0.0
    generation: int = 0
    memory_limit_bytes: float = 0.0
    host: MemoryUse | None = None
    device: MemoryUse | None = None
    curve: Mapping[int, float] = field(default_factory=dict)
    longest_request_tokens: float | None = 0.0
    token_bytes: float | None = 0.0


@dataclass(frozen=True)
class Sample:
    """Metrics of one replica: counts by window name (``short``, ``long``, ``verify``), gauges, and their age.

    ``coverage_s`` is the time that the longest window really covers; it is less for a young replica.
    ``scrape_s`` is the interval of its scrapes as it was seen, s; 0 if unknown.
    """

    windows: Mapping[str, Counts]
    gauges: Gauges
    age_s: float
    coverage_s: float
    scrape_s: float = 0.0

    @cached_property
    def finite(self) -> bool:
        """True if every count and gauge is finite: one that is not makes their sum so, and sums are quick."""
        gauges = self.gauges
        kinds = (_memory(kind) for kind in (gauges.host, gauges.device) if kind is not None)
        total = sum(filter(None, _gauges(gauges))) + sum(gauges.curve.values()) + sum(map(sum, kinds))
        for counts in self.windows.values():
            known = filter(None, _mappings(counts))  # neither what is absent nor what is empty
            total += sum(filter(None, _numbers(counts))) + sum(map(sum, map(_values, known)))
        return math.isfinite(total)


def _values_of(kind: type) -> attrgetter[tuple[Any, ...]]:
    """Reads the plain numbers of a dataclass, None where one is absent."""
    plain = {"int", "float", "float | None"}
    return attrgetter(*(item.name for item in fields(kind) if item.type in plain))


_gauges, _memory = _values_of(Gauges), _values_of(MemoryUse)


@dataclass(frozen=True)
class EngineView:
    """What an engine reports (``Engines.describe``). ``config`` is camelCase and in force."""

    instance: str
    generation: int
    epoch: int
    config: Mapping[str, Any]
    converging: bool
    ceilings: Mapping[str, int]


@dataclass(frozen=True)
class ObservedReplica:
    """One replica: its state in the cluster, its engine's report, its metrics.

    Attributes:
        engine: None if the engine could not be described.
        engine_problem: why it could not; None if it was described or not asked.
        sample: None without metrics of the replica.
    """

    uid: str
    name: str
    ready: bool
    terminating: bool = False
    pending_reason: str = ""
    created_at: float = 0.0
    restarts: int = 0
    engine: EngineView | None = None
    engine_problem: EngineProblem | None = None
    sample: Sample | None = None


@dataclass(frozen=True)
class Promoted:
    """The content of the owned ConfigMap: the promoted configuration (camelCase, whole)."""

    generation: int
    config: Mapping[str, Any]


@dataclass(frozen=True)
class SourceProblem:
    """Why a metrics source gave no samples: a reason of ``tuning.reasons`` and one sentence for people."""

    reason: str
    message: str


@dataclass(frozen=True)
class Boost:
    """An override in force that raises the minimum number of replicas until it expires."""

    name: str
    min_replicas: int
    expires_at: float


@dataclass(frozen=True)
class Pin:
    """An override in force that keeps a knob (camelCase) at a value until it expires."""

    name: str
    knob: str
    value: Any
    expires_at: float


@dataclass(frozen=True)
class Approval:
    """An override in force that allows the remedy of one decision (``d-0042``), and who asked for it."""

    name: str
    decision: str
    by: str = ""


@dataclass(frozen=True)
class Rollback:
    """An override in force that asks for an earlier generation of the configuration."""

    name: str
    to: int
    by: str = ""


@dataclass(frozen=True)
class FleetLimits:
    """What the operator's other resources, and the operator itself, permit this resource to do.

    Attributes:
        off: why tuning is switched off; "" while it is on.
        waits: reason and message why no experiment may begin now; None if one may.
        recommend_only: rules that did harm too often in the fleet.
        rules_hash: digest of the running rules, for the status; "" while this resource does not act by them.
    """

    off: str = ""
    waits: tuple[str, str] | None = None
    recommend_only: frozenset[str] = frozenset()
    rules_hash: str = ""


@dataclass(frozen=True)
class Observation:
    """Everything that a decision depends on.

    Attributes:
        name: of the resource, for messages; "" if it does not matter.
        at: time of the observation, s since the epoch (from the injected clock).
        base: the user's KVCacheConfig, camelCase, explicitly given fields only.
        promoted: None before the first configuration was written.
        desired_replicas: what the child workload asks for now.
        spec_replicas: the number that the user fixed in ``spec.replicas``; None where kvpilot chooses it.
        replicas_managed_by: another field manager that wrote the child's replicas; "" without one.
        autoscaler: the autoscaler that keeps writing them; "" without one.
        conflict_since: when the field-manager conflict began, s since the epoch; None without one.
        metrics_problem: why the metrics source gave no samples; None when it did.
        spec_error: why the present spec is invalid; the last valid one is in force meanwhile. "" when valid.
        paused_by: name of a pause override in force, "" without one.
        scaling_paused: True if that pause also stops boosts and bounds.
        pins, approvals, rollback: what other overrides in force ask for.
        fleet: what the operator's other resources permit.
        cache_lost_bytes: cache that pushes have dropped since the last status.
        recorded_decision, recorded_generation: the highest numbers that kept records name; 0 while the
            status knows more.
        recorded_base: the base that ``promoted`` was made from; None while the status knows more, or if
            nothing tells it.
        start_s: how long a new replica takes until it serves, s: the slow end of what was seen.
        rolling_out: True while the child workload replaces its pods.
    """

    at: float
    replicas: tuple[ObservedReplica, ...]
    base: Mapping[str, Any]
    promoted: Promoted | None
    desired_replicas: int
    spec_replicas: int | None = None
    replicas_managed_by: str = ""
    autoscaler: str = ""
    conflict_since: float | None = None
    metrics_problem: SourceProblem | None = None
    spec_error: str = ""
    paused_by: str = ""
    scaling_paused: bool = False
    boosts: tuple[Boost, ...] = ()
    pins: tuple[Pin, ...] = ()
    approvals: tuple[Approval, ...] = ()
    rollback: Rollback | None = None
    rolling_out: bool = False
    start_s: float = 60.0
    name: str = ""
    fleet: FleetLimits = FleetLimits()
    cache_lost_bytes: float = 0.0
    recorded_decision: int = 0
    recorded_generation: int = 0
    recorded_base: Mapping[str, Any] | None = None
    _totals: dict[tuple[str, frozenset[str] | None], Counts] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Cache: a decision needs the same sums a dozen times."""

    @cached_property
    def ready(self) -> tuple[ObservedReplica, ...]:
        """Replicas that serve and are not terminating."""
        return tuple(replica for replica in self.replicas if replica.ready and not replica.terminating)

    def counts(self, window: str, uids: frozenset[str] | None = None) -> Counts:
        """Counts of a window over the ready replicas (or those of ``uids``) that have a sample."""
        if (window, uids) not in self._totals:
            samples = (replica.sample for replica in self.ready if uids is None or replica.uid in uids)
            windows = (sample.windows.get(window) for sample in samples if sample is not None)
            self._totals[window, uids] = Counts.total(counts for counts in windows if counts is not None)
        return self._totals[window, uids]


def gauges_of(replicas: Iterable[ObservedReplica]) -> list[Gauges]:
    """The gauges of those that have a sample."""
    return [replica.sample.gauges for replica in replicas if replica.sample is not None]
