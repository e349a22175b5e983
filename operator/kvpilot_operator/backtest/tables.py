"""The printed figures of a backtest: one line per controller, and paired differences to kvpilot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from kvpilot_operator.backtest.contest import TUNED, Row
from kvpilot_operator.backtest.score import LAMBDAS, paired_interval, score


@dataclass(frozen=True)
class Difference:
    """Score of kvpilot minus that of another controller, over paired seeds; below 0 kvpilot is better."""

    weight: float
    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What the 95% interval says."""
        if self.high < 0:
            return "better"
        return "worse" if self.low > 0 else "no difference shown"


@dataclass(frozen=True)
class Line:
    """Means of one controller over its seeds; ``cure_s`` is the median over runs with a breach."""

    controller: str
    parameters: str
    violation_minutes: float
    gpu_hours: float
    cure_s: float | None
    reversals: float
    wrong_direction: float
    hold_minutes: float
    differences: tuple[Difference, ...]


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """One line per controller, in the order of the rows."""
    names = list(dict.fromkeys(row["controller"] for row in rows))
    by_name = {name: [row for row in rows if row["controller"] == name] for name in names}
    return [_line(name, mine, by_name.get(TUNED, [])) for name, mine in by_name.items()]


def _line(name: str, rows: Sequence[Row], tuned: Sequence[Row]) -> Line:
    cures = [row["time_to_cure_s"] for row in rows if row["time_to_cure_s"] is not None]

    def mean(key: str) -> float:
        return fmean(row[key] for row in rows)

    return Line(
        controller=name,
        parameters=rows[0].get("parameters", ""),
        violation_minutes=mean("violation_minutes"),
        gpu_hours=mean("gpu_hours"),
        cure_s=median(cures) if cures else None,
        reversals=mean("reversals"),
        wrong_direction=mean("wrong_direction"),
        hold_minutes=mean("hold_minutes"),
        differences=() if name == TUNED else tuple(_differences(rows, tuned)),
    )


def _differences(rows: Sequence[Row], tuned: Sequence[Row]) -> Iterator[Difference]:
    others: Mapping[int, Any] = {row["seed"]: row for row in rows}
    for weight in LAMBDAS:
        pairs = [
            score(row, weight) - score(others[row["seed"]], weight) for row in tuned if row["seed"] in others
        ]
        yield Difference(weight, *paired_interval(pairs))


def table(lines: Sequence[Line]) -> Iterator[str]:
    """The lines as text."""
    yield (
        f"{'controller':15} {'parameters':11} {'violation':>9} {'GPU':>7} {'cure':>7} {'rever-':>6} "
        f"{'wrong':>6} {'hold':>6}"
    )
    yield f"{'':15} {'':11} {'min':>9} {'hours':>7} {'s':>7} {'sals':>6} {'way':>6} {'min':>6}"
    for line in lines:
        cure = "-" if line.cure_s is None else f"{line.cure_s:.0f}"
        yield (
            f"{line.controller:15} {line.parameters or '-':11} {line.violation_minutes:9.1f} "
            f"{line.gpu_hours:7.2f} {cure:>7} {line.reversals:6.1f} {line.wrong_direction:6.1f} "
            f"{line.hold_minutes:6.1f}"
        )
    if any(line.differences for line in lines):
        yield ""
        yield "Violation minutes + lambda x GPU-hours of kvpilot minus that of the other, with 95% intervals:"
    for line in lines:
        for item in line.differences:
            yield (
                f"{line.controller:15} lambda {item.weight:<4g} {item.mean:+8.1f}  "
                f"[{item.low:+.1f}, {item.high:+.1f}]  {item.verdict}"
            )
