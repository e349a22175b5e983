"""A recording: what a deployment was offered, interval by interval, as JSON lines that a backtest replays.

The first line says what was recorded: ``{"kvpilotRecording": 1, "resource": "team-a/chat", "start":
"2026-01-01T00:00:00Z", "step": 60}``. One line follows per interval of ``step`` s, in order: ``{"at": 0,
"arrivals": 620, "prompt": 512.3, "cached": 401.2, "output": 48.9}``, with tokens of a mean request, and with
``{"at": 60, "gap": true}`` where nobody knows. Where the engines count their steps, a line also holds
``"work": {"admitted": 620, "answered": 618, "hit": 240000, "steps": 9800, "rows": 31000, "busy": 41.2}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvpilot_operator.load.workload import LoadError
from kvpilot_operator.resource.times import to_rfc3339

MARK = "kvpilotRecording"

MAX_NUMBER = 1e12


@dataclass(frozen=True)
class StepWork:
    """What all engines together did in an interval.

    Attributes:
        admitted, answered: requests that were not shed, and those that got their answer.
        hit: prompt tokens that the cache served.
        steps, rows: steps, and their rows summed over them.
        busy: time in steps, s.
    """

    admitted: float
    answered: float
    hit: float
    steps: float
    rows: float
    busy: float


@dataclass(frozen=True)
class Interval:
    """One interval from ``at`` s after the start; tokens of a mean request. ``gap``: there is no data.

    ``work`` is None in recordings of engines that do not count their steps, and in old ones.
    """

    at: float
    arrivals: float = 0.0
    prompt: float = 0.0
    cached: float = 0.0
    output: float = 0.0
    gap: bool = False
    work: StepWork | None = None


@dataclass(frozen=True)
class Recording:
    """What was recorded of a resource (``namespace/name``), from ``start`` (RFC 3339), every ``step`` s."""

    resource: str
    start: str
    step: float
    intervals: tuple[Interval, ...]

    @property
    def gaps(self) -> tuple[tuple[float, float], ...]:
        """Begin and end of every gap, s since the start."""
        found: list[tuple[float, float]] = []
        for interval in self.intervals:
            if interval.gap:
                joins = bool(found) and found[-1][1] == interval.at
                begin = found.pop()[0] if joins else interval.at
                found.append((begin, interval.at + self.step))
        return tuple(found)


def described_gaps(recording: Recording) -> list[str]:
    """One sentence per gap; the fourth counts the others."""
    sentences = [
        f"no data from {begin:.0f} s to {end:.0f} s: no requests are played there"
        for begin, end in recording.gaps
    ]
    return sentences if len(sentences) <= 4 else [*sentences[:3], f"and {len(sentences) - 3} more gaps"]


def lines_of(recording: Recording) -> Iterator[str]:
    """The lines of the file."""
    head = {MARK: 1, "resource": recording.resource, "start": recording.start, "step": recording.step}
    yield json.dumps(head)
    for item in recording.intervals:
        if item.gap:
            yield json.dumps({"at": item.at, "gap": True})
            continue
        tokens = {"prompt": item.prompt, "cached": item.cached, "output": item.output}
        numbers = {"arrivals": item.arrivals, **tokens}
        work = {} if item.work is None else {"work": _rounded(asdict(item.work))}
        yield json.dumps({"at": item.at, **_rounded(numbers), **work})


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: round(number, 2) for name, number in numbers.items()}


def is_recording(path: Path) -> bool:
    """True if the first line of a file is that of a recording; a file that cannot be read is none."""
    try:
        with path.open(encoding="utf-8") as file:
            return f'"{MARK}"' in file.readline(500)
    except (OSError, UnicodeDecodeError):
        return False


def read_recording(path: Path) -> Recording:
    """The recording in a file.

    Raises:
        LoadError: it cannot be read, is broken, empty or out of order; names file, line and fault.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise LoadError(f"recording {path}: cannot be read: {why}") from None
    rows = [
        (f"recording {path}:{number}", line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]
    where, first = rows[0]
    head = _row(where, first)
    if head.get(MARK) != 1:
        raise LoadError(f"{where}: {MARK}: must be 1, got {head.get(MARK)!r}")
    step = _number(where, head, "step", least=1.0)
    intervals = [_interval(where, _row(where, line)) for where, line in rows[1:]]
    if all(item.gap for item in intervals):
        raise LoadError(f"recording {path}: holds no interval with data")
    _check_order(rows[1:], intervals, step)
    return Recording(str(head.get("resource", "")), str(head.get("start", "")), step, tuple(intervals))


def _check_order(rows: Sequence[tuple[str, str]], intervals: Sequence[Interval], step: float) -> None:
    for index, ((where, _), item) in enumerate(zip(rows, intervals, strict=True)):
        if item.at != index * step:
            raise LoadError(
                f"{where}: at: must be {index * step:g}, one step after the line above, got {item.at:g}; "
                "a gap has a line of its own"
            )


def _interval(where: str, row: dict[str, Any]) -> Interval:
    at = _number(where, row, "at")
    if row.get("gap") is True:
        return Interval(at, gap=True)
    arrivals = _number(where, row, "arrivals")
    least = 1.0 if arrivals > 0 else 0.0
    prompt = _number(where, row, "prompt", least=least)
    cached, output = _number(where, row, "cached"), _number(where, row, "output", least=least)
    return Interval(at, arrivals, prompt, min(cached, prompt), output, work=_work(where, row))


def _work(where: str, row: dict[str, Any]) -> StepWork | None:
    work = row.get("work")
    if work is None:
        return None
    if not isinstance(work, dict):
        raise LoadError(f"{where}: work: must be a JSON object, got {work!r:.60}")
    return StepWork(**{item.name: _number(f"{where}: work", work, item.name) for item in fields(StepWork)})


def _row(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise LoadError(f"{where}: must be a JSON object, got {line[:60]!r}")
    return row


def _number(where: str, row: dict[str, Any], name: str, least: float = 0.0) -> float:
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= MAX_NUMBER:
        return float(value)
    got = "nothing" if value is None else repr(value)[:60]
    raise LoadError(f"{where}: {name}: must be a number from {least:g} to {MAX_NUMBER:g}, got {got}")


def recording_of(resource: str, start: float, step: float, intervals: Sequence[Interval]) -> Recording:
    """A recording that begins at ``start`` (s since the epoch)."""
    return Recording(resource, to_rfc3339(start), step, tuple(intervals))
