"""The operator's own metrics. Every name, label and meaning is here."""

from __future__ import annotations

from collections import defaultdict
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest

from kvpilot_operator.loop import Look
from kvpilot_operator.ports import Key

_RESOURCE = ("namespace", "name")


class OperatorMetrics:
    """Telemetry of the loop, the queue and the alerts, as Prometheus metrics of one registry."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._info = Gauge(
            "kvpilot_operator_info", "Constant 1. Labels: version.", ("version",), registry=registry
        )
        self._info.labels(version("kvpilot")).set(1)
        self._decisions = Counter(
            "kvpilot_operator_decisions",
            "Decision records. Labels: rule, outcome.",
            ("rule", "outcome"),
            registry=registry,
        )
        self._change = Gauge(
            "kvpilot_operator_change_in_flight",
            "1 while a change of the resource is in flight. Labels: namespace, name.",
            _RESOURCE,
            registry=registry,
        )
        self._holds = Gauge(
            "kvpilot_operator_hold",
            "1 while nothing is done for this reason. Labels: namespace, name, reason.",
            (*_RESOURCE, "reason"),
            registry=registry,
        )
        self._objectives = Gauge(
            "kvpilot_operator_objective_state",
            "1 for the present state. Labels: namespace, name, objective, state.",
            (*_RESOURCE, "objective", "state"),
            registry=registry,
        )
        self._mode = Gauge(
            "kvpilot_operator_mode",
            "1 for the resource's mode. Labels: namespace, name, mode.",
            (*_RESOURCE, "mode"),
            registry=registry,
        )
        self._replicas = Gauge(
            "kvpilot_operator_replicas",
            "Pods of the resource. Labels: namespace, name, state (asked, ready, pending).",
            (*_RESOURCE, "state"),
            registry=registry,
        )
        self._steps = Histogram(
            "kvpilot_operator_step_seconds",
            "Time of one step of a look. Labels: step.",
            ("step",),
            buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15),
            registry=registry,
        )
        self.queue_depth = Gauge(
            "kvpilot_operator_queue_depth", "Looks that are due or in progress.", registry=registry
        )
        self.look_failures = Counter(
            "kvpilot_operator_look_failures", "Looks that ended in an error.", registry=registry
        )
        self._alerts = Counter(
            "kvpilot_operator_alerts", "Alerts received. Labels: result.", ("result",), registry=registry
        )
        self._labels: dict[Key, set[tuple[Gauge, tuple[str, ...]]]] = defaultdict(set)

    def step(self, name: str, seconds: float) -> None:
        """One step of a look took ``seconds``."""
        self._steps.labels(name).observe(seconds)

    def alert(self, result: str) -> None:
        """One alert was dealt with."""
        self._alerts.labels(result).inc()

    def looked(self, look: Look) -> None:
        """A resource was looked at: replace everything that was said of it."""
        decision, observation = look.decision, look.observation
        for record in decision.records:
            self._decisions.labels(record.rule, record.outcome).inc()
        said: dict[tuple[Gauge, tuple[str, ...]], float] = {
            (self._change, ()): float(decision.state.change is not None),
            (self._mode, (look.policy.mode,)): 1.0,
            (self._replicas, ("asked",)): observation.replicas,
            (self._replicas, ("ready",)): len(observation.ready),
            (self._replicas, ("pending",)): sum(bool(pod.pending_reason) for pod in observation.pods),
        }
        for hold in decision.state.holds:
            said[self._holds, (hold.reason,)] = 1.0
        for objective in decision.objectives:
            said[self._objectives, (objective.name, objective.state)] = 1.0
        self._replace(look.key, said)

    def forget(self, key: Key) -> None:
        """The resource is gone."""
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
