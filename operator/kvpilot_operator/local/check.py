"""Did a knob cure a breach? Pure, over what was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvpilot_operator.local.recorder import Point
from kvpilot_operator.tuning.decision import Record

MET_TICKS = 3
"""Looks in a row that must show every latency objective held on the short window."""


@dataclass(frozen=True)
class Step:
    """One part of the proof: what was asked, when it was seen (s since the epoch), and how."""

    name: str
    at: float | None
    message: str

    @property
    def seen(self) -> bool:
        """Whether it happened."""
        return self.at is not None


@dataclass(frozen=True)
class Verdict:
    """The steps of a cure in their order. ``cured`` only when all of them were seen."""

    steps: tuple[Step, ...]

    @property
    def cured(self) -> bool:
        """A breach happened, was diagnosed, and was cured by a knob, with the same replicas."""
        return all(step.seen for step in self.steps)

    @property
    def reason(self) -> str:
        """One line: the first step that is missing, or what cured it."""
        missing = next((step for step in self.steps if not step.seen), None)
        return missing.message if missing is not None else f"cured: {self.steps[2].message}"


def judge_run(
    points: Sequence[Point], records: Sequence[Record], latency: Sequence[str], mode: str
) -> Verdict:
    """Judge a run.

    Args:
        points, records: everything recorded, oldest first.
        latency: names of the latency objectives.
        mode: of tuning, to say why nothing was done.
    """
    breach = _breach(points, latency)
    starts = [r for r in records if _after(r.at, breach) and _diagnosed(r)]
    # A first attempt may be taken back; the cure is the first one that was promoted.
    start = next((r for r in starts if _promotion(r, records)), starts[0] if starts else None)
    promoted = _promotion(start, records)
    again = _met_again(points, latency, promoted.at) if promoted is not None else None
    steps = [
        breach,
        _diagnosis(start, mode),
        _change(start, promoted, records),
        _again(again, points, promoted, latency),
    ]
    if breach.seen:
        steps.append(_same_replicas(points, breach.at or 0.0, again))
    return Verdict(tuple(steps))


def _after(at: float, step: Step) -> bool:
    return step.at is not None and at >= step.at


def _breach(points: Sequence[Point], latency: Sequence[str]) -> Step:
    for point in points:
        for objective in point.objectives:
            if objective.name in latency and objective.state == "Breached":
                measured = "-" if objective.measured_short is None else f"{objective.measured_short:.0%}"
                told = f"{objective.name} was breached: {measured} in time, {objective.target:.0%} wanted"
                return Step("breach", point.at, told)
    return Step("breach", None, "no latency objective was breached")


def _diagnosed(record: Record) -> bool:
    diagnosis = record.diagnosis
    return (
        record.outcome == "Started"
        and bool(record.changes)
        and diagnosis is not None
        and bool(diagnosis.stage)
    )


def _diagnosis(start: Record | None, mode: str) -> Step:
    if start is None or start.diagnosis is None:
        why = "" if mode == "Auto" else f": tuning mode is {mode}"
        return Step("diagnosis", None, f"no knob was changed for a breached latency objective{why}")
    return Step("diagnosis", start.at, f"{start.diagnosis.stage} at fault: {start.diagnosis.message}")


def _promotion(start: Record | None, records: Sequence[Record]) -> Record | None:
    if start is None:
        return None
    return next((r for r in records if r.id == start.id and r.outcome == "Promoted"), None)


def _change(start: Record | None, promoted: Record | None, records: Sequence[Record]) -> Step:
    if start is not None and promoted is not None:
        told = ", ".join(f"{c.knob} {c.before} -> {c.after}" for c in start.changes)
        return Step("change", promoted.at, f"{told} (generation {promoted.generation}, {promoted.rule})")
    ends = [r for r in records if start is not None and r.id == start.id and r is not start]
    if ends:
        return Step("change", None, f"the change was {ends[-1].outcome.lower()}: {ends[-1].summary}")
    return Step("change", None, "no change was promoted before the end")


def _met(point: Point, latency: Sequence[str]) -> bool:
    """Every latency objective holds on the short window, and nobody waits that could have a slot."""
    measured = [o for o in point.objectives if o.name in latency]
    held = all(o.measured_short is not None and o.measured_short >= o.target for o in measured)
    return bool(measured) and held and point.waiting <= max(1.0, 0.1 * point.running)


def _met_again(points: Sequence[Point], latency: Sequence[str], since: float) -> float | None:
    in_row = 0
    for point in points:
        in_row = in_row + 1 if point.at > since and _met(point, latency) else 0
        if in_row == MET_TICKS:
            return point.at
    return None


def _again(
    at: float | None, points: Sequence[Point], promoted: Record | None, latency: Sequence[str]
) -> Step:
    if at is not None and promoted is not None:
        told = f"every latency objective met again {at - promoted.at:.0f} s after the promotion"
        return Step("met again", at, told)
    last = points[-1].objectives if points else ()
    short = [o for o in last if o.name in latency and (o.measured_short or 0.0) < o.target]
    told = ", ".join(f"{o.name} {(o.measured_short or 0.0):.0%} of {o.target:.0%}" for o in short)
    return Step(
        "met again", None, f"the objectives were not met again before the end ({told or 'a backlog is left'})"
    )


def _same_replicas(points: Sequence[Point], since: float, until: float | None) -> Step:
    """Between the breach and its cure no replica was added, replaced or restarted."""
    end = float("inf") if until is None else until
    seen = [point for point in points if since <= point.at <= end]
    first = {engine.uid: engine.restarts for engine in seen[0].engines}
    for point in seen:
        now = {engine.uid: engine.restarts for engine in point.engines}
        if now != first:
            return Step("same replicas", None, "a replica was added, replaced or restarted meanwhile")
    return Step("same replicas", seen[-1].at, f"the same {len(first)} replicas, none restarted")
