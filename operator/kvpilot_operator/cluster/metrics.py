"""The operator's own metrics. Every name, label and meaning is here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest

from kvpilot_operator.reconcile.reconciler import Reconciliation
from kvpilot_operator.status.snapshot import Key
from kvpilot_operator.tuning.decision import OBJECTIVE_KINDS

_RESOURCE: Mapping[str, tuple[str, ...]] = {"namespace": (), "name": ()}


@dataclass(frozen=True)
class OperatorMetric:
    """One row of the table: what the reference page and prometheus_client need to know.

    Attributes:
        labels: label name -> its values; () where they depend on the resource.
    """

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_INFO = OperatorMetric("kvpilot_operator_info", "gauge", "Constant 1.", {"version": ()})
_DECISIONS = OperatorMetric(
    "kvpilot_operator_decisions_total", "counter", "Decision records.", {"rule": (), "outcome": ()}
)
_CHANGE = OperatorMetric(
    "kvpilot_operator_change_in_flight", "gauge", "1 while a change of the resource is in flight.", _RESOURCE
)
_HOLD = OperatorMetric(
    "kvpilot_operator_hold",
    "gauge",
    "1 while no change is made for this reason.",
    {**_RESOURCE, "reason": ()},
)
_OBJECTIVE = OperatorMetric(
    "kvpilot_operator_objective_state",
    "gauge",
    "1 for the present state of the objective; Critical is a breach below the throughput floor.",
    {
        **_RESOURCE,
        "objective": tuple(OBJECTIVE_KINDS),
        "state": ("Met", "Breached", "Critical", "Unknown", "Infeasible"),
    },
)
_MODE = OperatorMetric(
    "kvpilot_operator_mode", "gauge", "1 for the mode of the resource.", {**_RESOURCE, "mode": ()}
)
_REPLICAS = OperatorMetric(
    "kvpilot_operator_replicas",
    "gauge",
    "Replicas of the resource.",
    {**_RESOURCE, "state": ("asked", "ready", "pending")},
)
_STEPS = OperatorMetric(
    "kvpilot_operator_step_seconds", "histogram", "Time of one step of a reconcile, s.", {"step": ()}
)
_QUEUE = OperatorMetric("kvpilot_operator_queue_depth", "gauge", "Reconciles that are due or in progress.")
_FAILURES = OperatorMetric(
    "kvpilot_operator_reconcile_failures_total", "counter", "Reconciles that ended in an error."
)
_ALERTS = OperatorMetric("kvpilot_operator_alerts_total", "counter", "Alerts received.", {"result": ()})
_ENABLED = OperatorMetric(
    "kvpilot_operator_tuning_enabled", "gauge", "0 while the kill switch keeps tuning off, else 1."
)
_RECOMMEND_ONLY = OperatorMetric(
    "kvpilot_operator_rule_recommend_only",
    "gauge",
    "1 while the rule is only recommended, since three of its changes did harm within an hour.",
    {"rule": ()},
)

METRICS = (
    _INFO, _DECISIONS, _CHANGE, _HOLD, _OBJECTIVE, _MODE, _REPLICAS, _STEPS, _QUEUE, _FAILURES, _ALERTS,
    _ENABLED, _RECOMMEND_ONLY,
)  # fmt: skip
"""Every metric of the operator, in the order of the reference page."""


class OperatorMetrics:
    """Telemetry of the reconciler, the queue and the alerts, in one Prometheus registry."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._gauge(_INFO).labels(version("kvpilot")).set(1)
        self._decisions = self._counter(_DECISIONS)
        self._change = self._gauge(_CHANGE)
        self._holds = self._gauge(_HOLD)
        self._objectives = self._gauge(_OBJECTIVE)
        self._mode = self._gauge(_MODE)
        self._replicas = self._gauge(_REPLICAS)
        self._steps = Histogram(
            _STEPS.name,
            _STEPS.help,
            list(_STEPS.labels),
            buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15),
            registry=registry,
        )
        self.queue_depth = self._gauge(_QUEUE)
        self.reconcile_failures = self._counter(_FAILURES)
        self._alerts = self._counter(_ALERTS)
        self._enabled = self._gauge(_ENABLED)
        self._enabled.set(1)
        self._blocked = self._gauge(_RECOMMEND_ONLY)
        self._labels: dict[Key, set[tuple[Gauge, tuple[str, ...]]]] = defaultdict(set)

    def _gauge(self, metric: OperatorMetric) -> Gauge:
        return Gauge(metric.name, metric.help, list(metric.labels), registry=self.registry)

    def _counter(self, metric: OperatorMetric) -> Counter:
        return Counter(metric.name, metric.help, list(metric.labels), registry=self.registry)

    def step(self, name: str, seconds: float) -> None:
        """One step of a reconcile took ``seconds``."""
        self._steps.labels(name).observe(seconds)

    def alert(self, result: str) -> None:
        """One alert ended with ``result``."""
        self._alerts.labels(result).inc()

    def fleet(self, *, tuning: bool, recommend_only: frozenset[str]) -> None:
        """What holds for all resources."""
        self._enabled.set(float(tuning))
        self._blocked.clear()
        for rule in recommend_only:
            self._blocked.labels(rule).set(1)

    def reconciled(self, result: Reconciliation) -> None:
        """A resource was reconciled: replace its series."""
        decision, observation = result.decision, result.observation
        for record in decision.records:
            self._decisions.labels(record.rule, record.outcome).inc()
        said: dict[tuple[Gauge, tuple[str, ...]], float] = {
            (self._change, ()): float(decision.state.change is not None),
            (self._mode, (result.policy.mode,)): 1.0,
            (self._replicas, ("asked",)): observation.desired_replicas,
            (self._replicas, ("ready",)): len(observation.ready),
            (self._replicas, ("pending",)): sum(bool(pod.pending_reason) for pod in observation.replicas),
        }
        for hold in decision.state.holds:
            said[self._holds, (hold.reason,)] = 1.0
        for objective in decision.objectives:
            state = "Critical" if objective.severity == "critical" else objective.state
            said[self._objectives, (objective.name, state)] = 1.0
        self._replace(result.key, said)

    def forget(self, key: Key) -> None:
        """The resource was deleted: remove its series."""
        self._replace(key, {})
        self._labels.pop(key, None)

    def text(self) -> bytes:
        """The page that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _replace(self, key: Key, said: dict[tuple[Gauge, tuple[str, ...]], float]) -> None:
        for gauge, labels in self._labels[key] - set(said):
            gauge.remove(*key, *labels)
        for (gauge, labels), value in said.items():
            gauge.labels(*key, *labels).set(value)
        self._labels[key] = set(said)
