"""Checks whether a knob cured a breach of a latency objective. Pure: reads only what was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvpilot_engine.contract.wording import counted
from kvpilot_operator.local.recorder import Point
from kvpilot_operator.tuning.assess.objectives import backlog_gone, latency_met, met_again
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.decision import Record


@dataclass(frozen=True)
class CheckStep:
    """One step of a cure; ``at`` is when it was seen, s since the epoch, None if it was not."""

    name: str
    at: float | None
    message: str

    @property
    def seen(self) -> bool:
        """True if the step was seen."""
        return self.at is not None


@dataclass(frozen=True)
class CheckResult:
    """Result of ``--check``: the steps of a cure in their order."""

    steps: tuple[CheckStep, ...]

    @property
    def cured(self) -> bool:
        """True if all steps were seen: breach, diagnosis, change of a knob, objective met, same replicas."""
        return all(step.seen for step in self.steps)

    @property
    def reason(self) -> str:
        """One line: the first missing step, or the change that cured the breach."""
        missing = next((step for step in self.steps if not step.seen), None)
        return missing.message if missing is not None else f"cured: {self.steps[2].message}"


def check_run(
    points: Sequence[Point], records: Sequence[Record], latency: Sequence[str], mode: str
) -> CheckResult:
    """Check a run.

    Args:
        points, records: all that was recorded, oldest first.
        latency: names of the latency objectives.
        mode: tuning mode, which may explain why no knob was changed.
    """
    breach = _breach(points, latency)
    starts = [r for r in records if _after(r.at, breach) and _diagnosed(r)]
    # Earlier attempts may have been reverted: the first promoted change is the cure.
    start = next((r for r in starts if _promotion(r, records)), starts[0] if starts else None)
    promoted = _promotion(start, records)
    again = _met_again(points, promoted.at) if promoted is not None else None
    steps = [
        breach,
        _diagnosis(start, mode),
        _change(start, promoted, records),
        _again(again, points, promoted, latency),
    ]
    if breach.seen:
        steps.append(_same_replicas(points, breach.at or 0.0, again))
    return CheckResult(tuple(steps))


def _after(at: float, step: CheckStep) -> bool:
    return step.at is not None and at >= step.at


def _breach(points: Sequence[Point], latency: Sequence[str]) -> CheckStep:
    for point in points:
        for objective in point.objectives:
            if objective.name in latency and objective.state == "Breached":
                measured = "-" if objective.measured_short is None else f"{objective.measured_short:.0%}"
                reported = f"{objective.name} was breached: {measured} in time, {objective.target:.0%} wanted"
                return CheckStep("breach", point.at, reported)
    return CheckStep("breach", None, "no latency objective was breached")


def _diagnosed(record: Record) -> bool:
    diagnosis = record.diagnosis
    return (
        record.outcome == "Started"
        and bool(record.changes)
        and diagnosis is not None
        and bool(diagnosis.stage)
    )


def _diagnosis(start: Record | None, mode: str) -> CheckStep:
    if start is None or start.diagnosis is None:
        why = "" if mode == "Auto" else f": tuning mode is {mode}"
        return CheckStep("diagnosis", None, f"no knob was changed for a breached latency objective{why}")
    return CheckStep("diagnosis", start.at, f"{start.diagnosis.stage} at fault: {start.diagnosis.message}")


def _promotion(start: Record | None, records: Sequence[Record]) -> Record | None:
    if start is None:
        return None
    return next((r for r in records if r.id == start.id and r.outcome == "Promoted"), None)


def _change(start: Record | None, promoted: Record | None, records: Sequence[Record]) -> CheckStep:
    if start is not None and promoted is not None:
        reported = ", ".join(f"{c.knob} {c.before} -> {c.after}" for c in start.changes)
        return CheckStep(
            "change", promoted.at, f"{reported} (generation {promoted.generation}, {promoted.rule})"
        )
    ends = [r for r in records if start is not None and r.id == start.id and r is not start]
    if ends:
        return CheckStep("change", None, f"the change was {ends[-1].outcome.lower()}: {ends[-1].summary}")
    return CheckStep("change", None, "no change was promoted before the end")


def _met_again(points: Sequence[Point], since: float) -> float | None:
    """When, after ``since``, the latency objectives were met and the backlog was drained."""
    later = [point for point in points if point.at > since]
    index = met_again(latency_met(point.objectives) and _calm(point) for point in later)
    return None if index is None else later[index].at


def _calm(point: Point) -> bool:
    ready = sum(replica.ready for replica in point.replicas)
    return backlog_gone(point.waiting, ready, value(point.knobs, "numWorkers"))


def _again(
    at: float | None, points: Sequence[Point], promoted: Record | None, latency: Sequence[str]
) -> CheckStep:
    if at is not None and promoted is not None:
        reported = f"every latency objective met again {at - promoted.at:.0f} s after the promotion"
        return CheckStep("met again", at, reported)
    last = points[-1].objectives if points else ()
    short = [o for o in last if o.name in latency and (o.measured_short or 0.0) < o.target]
    reported = ", ".join(f"{o.name} {(o.measured_short or 0.0):.0%} of {o.target:.0%}" for o in short)
    return CheckStep(
        "met again",
        None,
        f"the objectives were not met again before the end ({reported or 'a backlog remains'})",
    )


def _same_replicas(points: Sequence[Point], since: float, until: float | None) -> CheckStep:
    """No replica was added, replaced or restarted between the breach and its cure."""
    end = float("inf") if until is None else until
    seen = [point for point in points if since <= point.at <= end]
    first = {replica.uid: replica.restarts for replica in seen[0].replicas}
    for point in seen:
        now = {replica.uid: replica.restarts for replica in point.replicas}
        if now != first:
            return CheckStep("same replicas", None, "a replica was added, replaced or restarted meanwhile")
    return CheckStep(
        "same replicas", seen[-1].at, f"the same {counted(len(first), 'replica')}, none restarted"
    )
