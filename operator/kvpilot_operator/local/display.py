"""What is shown while it runs: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from kvpilot_operator.load.results import Tally
from kvpilot_operator.local.recorder import Point
from kvpilot_operator.tuning.decision import Objective

LINE_S = 5.0
"""Between two plain lines of figures, s."""

SHOWN_KNOBS = ("numWorkers", "batchSize", "maxStepTokens", "prefetchSize", "maxTokens", "compressionRatio")
EVENTS = 12

EVENT_LINES = 5
"""Of the screen, at least: where a long table leaves fewer to the events, the table is cut instead."""


class Display(Protocol):
    """Where a run tells what happens."""

    def open(self) -> None:
        """Begin."""

    def close(self) -> None:
        """End; what was told stays readable."""

    def tell(self, line: str) -> None:
        """Something happened."""

    def show(self, point: Point, tally: Tally | None) -> None:
        """New figures."""


def told_objective(item: Objective) -> str:
    """``p95 97% of 95%``; a throughput that nobody asked for has no target."""
    rate = item.name == "throughput"
    figure = "-" if item.measured_short is None else _figure(item.measured_short, rate)
    if rate and not item.target:
        return f"{item.name} {figure}"
    return f"{item.name} {figure} of {_figure(item.target, rate)}"


def _figure(value: float, rate: bool) -> str:
    return f"{value:.1f}/s" if rate else f"{value:.0%}"


def told_ms(value: float | None) -> str:
    """Seconds as milliseconds, or a dash."""
    return "-" if value is None else f"{value * 1000:.0f} ms"


class Lines:
    """Plain lines: one per event, and the figures every few seconds."""

    def __init__(self, started: float, write: Callable[[str], None] = print) -> None:
        self._started = started
        self._write = write
        self._shown = float("-inf")

    def open(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Nothing to leave."""

    def tell(self, line: str) -> None:
        """One line with the time since the start."""
        self._line(line)

    def show(self, point: Point, tally: Tally | None) -> None:
        """One line, unless the last one is fresh."""
        now = time.monotonic()
        if now - self._shown < LINE_S:
            return
        self._shown = now
        latency = "  ".join(f"{name} {told_ms(value)}" for name, value in point.quantiles.items())
        states = " ".join(f"{o.name}={o.state}" for o in point.objectives if o.state != "Unknown")
        self._line(
            f"  {point.load_phase or 'idle':5} {point.arrivals:5.1f}/s in {point.completed:5.1f}/s out  "
            f"{latency or 'no latency yet'}  waiting {point.waiting:.0f}  "
            f"hit {'-' if point.hit_rate is None else f'{point.hit_rate:.0%}'}  "
            f"numWorkers {_by_engine(point, 'numWorkers')}  {point.tuning}  {states}"
        )

    def _line(self, text: str) -> None:
        self._write(f"{time.time() - self._started:6.1f}s {text}")


def _by_engine(point: Point, knob: str) -> str:
    """One value, or one for each engine while they differ."""
    values = [str(engine.knobs.get(knob, "?")) for engine in point.engines if engine.knobs]
    return "/".join(values) if len(set(values)) > 1 else (values[0] if values else "?")


class LiveTable:
    """A table that is redrawn in place, with the last events below it: as many as the screen has room for."""

    def __init__(self, title: str, started: float, console: Console) -> None:
        self._title = title
        self._started = started
        self._events: deque[str] = deque(maxlen=EVENTS)
        self._point: Point | None = None
        self._tally: Tally | None = None
        self._live = Live(self, console=console, refresh_per_second=2)

    def open(self) -> None:
        """Take the screen's end."""
        self._live.start()

    def close(self) -> None:
        """Leave the last table on the screen."""
        self._live.stop()

    def tell(self, line: str) -> None:
        """Add an event below the table."""
        self._events.append(f"{time.time() - self._started:6.1f}s {line}")

    def show(self, point: Point, tally: Tally | None) -> None:
        """Draw these figures from now on."""
        self._point, self._tally = point, tally

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = [] if self._point is None else console.render_lines(self._table(self._point), options)
        height = options.size.height
        room = max(height - len(table), EVENT_LINES)
        events: list[list[Segment]] = []
        for event in reversed(self._events):  # rich itself would cut the end, which is the news
            lines = console.render_lines(Text(event), options)
            if events and len(lines) + len(events) > room:
                break
            events = lines + events
        for line in (*table[: max(0, height - len(events))], *events):
            yield from line
            yield Segment.line()

    def _table(self, point: Point) -> Table:
        table = Table(title=f"{self._title}  {time.time() - self._started:.0f} s", title_justify="left")
        for heading in ("objectives", "now", "engines", "knobs"):
            table.add_column(heading)
        objectives = Text("\n").join(
            Text(f"{told_objective(item)} {item.state}", style=_STYLES.get(item.state, ""))
            for item in point.objectives
        )
        table.add_row(objectives, _now(point, self._tally), _engines(point), _knobs(point))
        return table


_STYLES: Mapping[str, str] = {
    "Met": "green",
    "Breached": "bold red",
    "Unknown": "dim",
    "Infeasible": "yellow",
}


def _now(point: Point, tally: Tally | None) -> str:
    lines = [
        f"load {point.load_phase or 'idle'}, {point.arrivals:.1f}/s in, {point.completed:.1f}/s out",
        "  ".join(f"{name} {told_ms(value)}" for name, value in point.quantiles.items()) or "no latency yet",
        f"waiting {point.waiting:.0f}, running {point.running:.0f}",
        f"hit rate {'-' if point.hit_rate is None else f'{point.hit_rate:.0%}'}",
        f"tuning {point.tuning}" + (f" ({', '.join(point.holds)})" if point.holds else ""),
    ]
    if tally is not None:
        lines.append(f"sent {tally.offered}, ended {len(tally.results)}")
    return "\n".join(lines)


def _engines(point: Point) -> str:
    return "\n".join(
        f"{engine.name} {'ready' if engine.ready else 'not ready'}, generation {engine.generation}"
        + (f", {engine.restarts} restarts" if engine.restarts else "")
        for engine in point.engines
    )


def _knobs(point: Point) -> str:
    return "\n".join(f"{name} {_by_engine(point, name)}" for name in SHOWN_KNOBS)


def display_for(title: str, started: float, console: Console) -> Display:
    """The table in a terminal, lines otherwise."""
    if console.is_terminal:
        return LiveTable(title, started, console)
    return Lines(started, lambda line: print(line, flush=True))
