"""Checks of a valid manifest: what it asks for and can never get. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Literal

from kvpilot_engine.contract import BLOCK_TOKENS, CATALOGUE
from kvpilot_engine.contract.wording import counted
from kvpilot_operator.resource.model import DeploymentSpec, field_bounds
from kvpilot_operator.resource.resolve import base_config, not_yet_effective, policy_of
from kvpilot_operator.tuning.configuration import value, within
from kvpilot_operator.tuning.context import at_text, format_value
from kvpilot_operator.tuning.permission.windows import opens_at
from kvpilot_operator.tuning.policy import Policy, Scaling, Window
from kvpilot_operator.tuning.rules.bands import Cycle, bands, cycles
from kvpilot_operator.tuning.rules.memory import EMERGENCY_MEMORY
from kvpilot_operator.tuning.rules.order import REMEDIES, Remedy
from kvpilot_operator.tuning.rules.reach import Obstacle, obstacles, stuck
from kvpilot_operator.tuning.rules.signals import Move

YEAR_S = 366 * 86_400.0

MIN_REQUEST_S = 0.005
"""No request of a language model takes less: a few steps of a small model, s."""


Severity = Literal["error", "warning", "info"]
ORDER: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """One finding: an error can never work, a warning rarely is meant, an info follows from what is asked."""

    severity: Severity
    field: str
    message: str

    @property
    def line(self) -> str:
        """For people."""
        return f"{self.severity}: {self.field}: {self.message}"

    def as_json(self) -> dict[str, str]:
        """For programs."""
        return asdict(self)


@dataclass(frozen=True)
class _Subject:
    spec: DeploymentSpec
    policy: Policy
    base: dict[str, object]
    now: float
    obstacles: dict[str, Obstacle]

    def may_act(self, remedy: Remedy) -> bool:
        """True if an enabled rule can act, now or after another one."""
        obstacle = self.obstacles.get(remedy.name)
        return obstacle is None or bool(obstacle.after)


def lint(spec: DeploymentSpec, now: float) -> list[Finding]:
    """All findings, the worst first.

    Args:
        now: s since the epoch; windows are checked from then on.

    Raises:
        ManifestError: the spec contradicts itself, so that the operator would refuse it.
    """
    base = base_config(spec).model_dump(by_alias=True, exclude_unset=True, mode="json")
    policy = policy_of(spec)
    subject = _Subject(spec, policy, base, now, _in_the_way(spec, policy, base))
    found = [finding for check in _CHECKS for finding in check(subject)]
    return sorted(found, key=lambda finding: ORDER.index(finding.severity))


def _rules(subject: _Subject) -> Iterator[Finding]:
    """Rules that can never act, or only after another one."""
    policy = subject.policy
    if policy.mode == "Off":
        yield Finding("info", "spec.tuning.mode", "Off: no rule can ever fire")
        return
    for remedy in REMEDIES:
        if remedy.name in policy.disabled_rules:
            message = f"{remedy.name} can never fire: it is disabled"
            yield Finding("info", "spec.tuning.disabledRules", message)
        elif (obstacle := subject.obstacles.get(remedy.name)) is not None:
            yield from _obstructed(remedy, obstacle, subject)


def _obstructed(remedy: Remedy, obstacle: Obstacle, subject: _Subject) -> Iterator[Finding]:
    """What keeps a rule from acting.

    A wait for another rule is worth a line where a given base stands at its max, so that more load finds no
    room; a default strategy that leaves nothing to try is not.
    """
    given = {*subject.base, *(item.name for item in subject.spec.tuning.knobs)}
    if obstacle.after:
        if remedy.knobs[0] in given and all(move.way == "down" for move in obstacle.ends):
            message = f"{remedy.name} can fire only after {' or '.join(obstacle.after)}: {obstacle.message}"
            yield Finding("info", obstacle.field, message)
    elif remedy.knobs != ("cacheStrategy",) or not obstacle.knobs or "cacheStrategy" in given:
        severity: Severity = "info" if obstacle.asked else "warning"
        yield Finding(severity, obstacle.field, f"{remedy.name} can never fire: {obstacle.message}")


def _in_the_way(spec: DeploymentSpec, policy: Policy, base: dict[str, object]) -> dict[str, Obstacle]:
    """Why rules that are not disabled cannot act at the base values, by name."""
    limits = {entry.resource_name: field_bounds(entry.name) for entry in CATALOGUE}
    enabled = [remedy for remedy in REMEDIES if remedy.name not in policy.disabled_rules]
    found = obstacles([remedy for remedy in enabled if remedy.knobs], base, policy, limits)
    for remedy in enabled:
        if not remedy.knobs and (obstacle := _never_scales(remedy, policy.scaling)) is not None:
            found[remedy.name] = obstacle
    return found


def _never_scales(remedy: Remedy, scaling: Scaling | None) -> Obstacle | None:
    if scaling is None:
        return None  # a person or another autoscaler chooses the number: that is how it is asked for
    if scaling.minimum == scaling.maximum and not scaling.schedules:
        return Obstacle("spec.scaling", (), f"min and max are {scaling.minimum}")
    if scaling.direction == ("InOnly" if remedy.replicas > 0 else "OutOnly"):
        return Obstacle("spec.scaling.direction", (), f"direction is {scaling.direction}", asked=True)
    if scaling.gpu_limit is not None and remedy.replicas > 0 and scaling.gpu_limit <= scaling.minimum:
        message = f"it allows {counted(scaling.gpu_limit, 'replica')}, as many as the minimum"
        return Obstacle("spec.tuning.budgets.maxGPUs", (), message)
    return None


def _bases(subject: _Subject) -> Iterator[Finding]:
    """Base values that the tuner may not choose itself."""
    for name, bounds in subject.policy.bounds.items():
        given = subject.base.get(name)
        if given is None or not bounds.tune or within(bounds, given):
            continue
        yield Finding(
            "error",
            f"spec.engine.config.{name}",
            f"{format_value(given)} is outside of the tuner's bounds {bounds.minimum:g} to "
            f"{bounds.maximum:g}; widen them in spec.tuning.knobs, or give the knob tune: false there",
        )


def _bands(subject: _Subject) -> Iterator[Finding]:
    """Thresholds that overlap."""
    memory, field = subject.policy.objectives.memory, "spec.objectives.memory"
    if memory > EMERGENCY_MEMORY:
        yield Finding(
            "warning",
            field,
            f"{memory:.0%} is above {EMERGENCY_MEMORY:.0%}, where memory-emergency cuts the batch at once: "
            "memory-relief would come too late",
        )


def _cycles(subject: _Subject) -> Iterator[Finding]:
    """Pairs of rules that can undo each other's change of a knob for ever."""
    policy = subject.policy
    if policy.mode != "Auto":
        return  # each change waits for a person, or none is made
    firing = [item for item in REMEDIES if item.name not in policy.disabled_rules and subject.may_act(item)]

    def movable(move: Move) -> bool:
        return stuck(policy.bounds.get(move.knob), move) is None

    for cycle in cycles(firing, bands(policy), movable):
        (first, second), (cured, raised) = cycle.rules, cycle.signals
        does, undoes = ("raises", "lowers") if cycle.move.way == "up" else ("lowers", "raises")
        yield Finding(
            "warning",
            "spec.tuning",
            f"{first.name} and {second.name} can cycle: {first.name} {does} {cycle.move.knob} against "
            f"{cured}, which raises {raised}; {second.name} then {undoes} it, which raises {cured} again. "
            f"{_remedy_of(subject, cycle)}",
        )


def _remedy_of(subject: _Subject, cycle: Cycle) -> str:
    """What the user can change about a pair that can cycle."""
    policy, (first, second) = subject.policy, cycle.rules
    ways = []
    for item in cycle.cures:
        if item.name in policy.disabled_rules:
            ways.append(f"take {item.name} out of spec.tuning.disabledRules, so that it acts first")
        elif not subject.may_act(item):
            ways.append(f"let {item.name} act first ({subject.obstacles[item.name].message})")
        else:
            ways.append(f"lower spec.objectives.{cycle.signals[1]}, so that {item.name} acts first")
    ways += [f"let {move.knob} go {move.way} with it in spec.tuning.knobs" for move in cycle.along]
    only = "DownOnly" if cycle.move.way == "up" else "UpOnly"
    ways.append(f"give {cycle.move.knob} direction: {only}")
    needless = " or ".join(item.name for item in (first, second) if not item.urgent)
    ways.append(f"list {needless} in spec.tuning.disabledRules")
    *more, last = ways
    return f"To end it, {', '.join(more)}, or {last}."


def _objectives(subject: _Subject) -> Iterator[Finding]:
    """Objectives that nothing within the bounds can reach."""
    wanted = subject.policy.objectives
    if wanted.hit_rate >= 1:
        message = "100% can never be met: the first tokens of every prompt are new once"
        yield Finding("error", "spec.objectives.hitRate", message)
    tokens, workers = _most(subject, "maxTokens"), value(subject.base, "numWorkers")
    if wanted.hit_rate and tokens < workers * BLOCK_TOKENS:
        yield Finding(
            "error",
            "spec.objectives.hitRate",
            f"{wanted.hit_rate:.0%} is out of reach: maxTokens {tokens:g} holds less than a block of "
            f"{BLOCK_TOKENS} tokens for each of {counted(workers, 'worker')}, so requests evict each other's "
            "prefixes",
        )
    replicas = subject.spec.replicas or 0
    if (scaling := subject.policy.scaling) is not None:
        replicas = max([scaling.maximum, *(item.maximum or 0 for item in scaling.schedules)])
        replicas = min(replicas, scaling.gpu_limit or replicas)
    slots = replicas * _most(subject, "numWorkers")
    if wanted.throughput and replicas and slots / wanted.throughput < MIN_REQUEST_S:
        yield Finding(
            "error",
            "spec.objectives.throughput.target",
            f"{wanted.throughput:g} requests/s are out of reach: {counted(replicas, 'replica')} with at most "
            f"{counted(int(_most(subject, 'numWorkers')), 'worker')} would have to end each request within "
            f"{slots / wanted.throughput * 1000:.2g} ms",
        )


def _most(subject: _Subject, knob: str) -> float:
    """The largest value that a knob can take by tuning."""
    base, bounds = float(value(subject.base, knob)), subject.policy.bounds[knob]
    if not bounds.tune or bounds.direction == "DownOnly" or subject.policy.mode == "Off":
        return base
    return max(base, float("inf") if bounds.maximum is None else bounds.maximum)


def _windows(subject: _Subject) -> Iterator[Finding]:
    """Windows that never or hardly open, and schedules without effect or against each other."""
    for index, window in enumerate(subject.policy.maintenance):
        yield from _rarely(window, f"spec.tuning.maintenanceWindows.{index}", subject.now)
    scaling = subject.policy.scaling
    if scaling is None:
        return
    for index, item in enumerate(scaling.schedules):
        field = f"spec.scaling.schedules.{index}"
        yield from _rarely(item.window, field, subject.now)
        if item.minimum <= scaling.minimum and item.maximum is None:
            message = f"min {item.minimum} has no effect: scaling.min is {scaling.minimum}"
            yield Finding("warning", f"{field}.min", message)
        if scaling.gpu_limit is not None and item.minimum > scaling.gpu_limit:
            allowed = f"budgets.maxGPUs allows {counted(scaling.gpu_limit, 'replica')}"
            message = f"{item.minimum} is out of reach: {allowed}"
            yield Finding("error", f"{field}.min", message)
    for (first, one), (second, other) in permutations(enumerate(scaling.schedules), 2):
        if one.maximum is not None and one.maximum < other.minimum:
            message = f"max {one.maximum} is below min {other.minimum} of schedule {second}, which wins"
            yield Finding("warning", f"spec.scaling.schedules.{first}.max", f"{message} while both are open")


def _rarely(window: Window, field: str, now: float) -> Iterator[Finding]:
    """A window that does not open within a year; a day that no month has is refused before."""
    if (start := opens_at(window, now)) is None:
        yield Finding("error", field, "it never opens")
    elif start > now + YEAR_S:
        yield Finding("warning", field, f"it does not open within a year: the next time is {at_text(start)}")


def _idle_values(subject: _Subject) -> Iterator[Finding]:
    """Given values without effect in this version."""
    for notice in not_yet_effective(subject.spec):
        yield Finding("warning", f"spec.engine.config.{notice.field}", notice.message)


_CHECKS: tuple[Callable[[_Subject], Iterator[Finding]], ...] = (
    _rules,
    _bases,
    _bands,
    _cycles,
    _objectives,
    _windows,
    _idle_values,
)
