"""Display of a run: a live table in a terminal, plain lines elsewhere."""

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
"""Minimum time between two lines of figures, s."""

SHOWN_KNOBS = ("numWorkers", "batchSize", "maxStepTokens", "prefetchSize", "maxTokens", "compressionRatio")
EVENTS = 12

EVENT_LINES = 5
"""Minimum lines of the screen for events; a longer table is cut."""


class Display(Protocol):
    """Shows the events and figures of a run."""

    def open(self) -> None:
        """Start to show."""

    def close(self) -> None:
        """Stop; leave the last output on the screen."""

    def notify(self, line: str) -> None:
        """Show an event of one line."""

    def show(self, point: Point, tally: Tally | None) -> None:
        """Show new figures; ``tally`` is None without a load."""


def format_objective(item: Objective) -> str:
    """``p95 97% of 95%``; without the target for a throughput of 0, which judges nothing."""
    rate = item.name == "throughput"
    figure = "-" if item.measured_short is None else _figure(item.measured_short, rate)
    if rate and not item.target:
        return f"{item.name} {figure}"
    return f"{item.name} {figure} of {_figure(item.target, rate)}"


def _figure(value: float, rate: bool) -> str:
    return f"{value:.1f}/s" if rate else f"{value:.0%}"


def format_ms(value: float | None) -> str:
    """Seconds as text in milliseconds; a dash for None."""
    return "-" if value is None else f"{value * 1000:.0f} ms"


class Lines:
    """Plain lines: one for each event, and figures every few seconds."""

    def __init__(self, started: float, write: Callable[[str], None] = print) -> None:
        self._started = started
        self._write = write
        self._shown = float("-inf")

    def open(self) -> None:
        """Do nothing: lines need no preparation."""

    def close(self) -> None:
        """Do nothing: all lines are written."""

    def notify(self, line: str) -> None:
        """Write one line with the time since the start."""
        self._line(line)

    def show(self, point: Point, tally: Tally | None) -> None:
        """Write one line of figures, at most every ``LINE_S``."""
        now = time.monotonic()
        if now - self._shown < LINE_S:
            return
        self._shown = now
        latency = "  ".join(f"{name} {format_ms(value)}" for name, value in point.quantiles.items())
        states = " ".join(f"{o.name}={o.state}" for o in point.objectives if o.state != "Unknown")
        self._line(
            f"  {point.load_phase or 'idle':5} {point.arrivals:5.1f}/s in {point.completed:5.1f}/s out  "
            f"{latency or 'no latency yet'}  waiting {point.waiting:.0f}  "
            f"hit {'-' if point.hit_rate is None else f'{point.hit_rate:.0%}'}  "
            f"numWorkers {_by_replica(point, 'numWorkers')}  {point.tuning}  {states}"
        )

    def _line(self, text: str) -> None:
        self._write(f"{time.time() - self._started:6.1f}s {text}")


def _by_replica(point: Point, knob: str) -> str:
    """The value of a knob, or one for each replica if they differ."""
    values = [str(replica.knobs.get(knob, "?")) for replica in point.replicas if replica.knobs]
    return "/".join(values) if len(set(values)) > 1 else (values[0] if values else "?")


class LiveTable:
    """A table that is redrawn in place, above as many of the last events as fit on the screen."""

    def __init__(self, title: str, started: float, console: Console) -> None:
        self._title = title
        self._started = started
        self._events: deque[str] = deque(maxlen=EVENTS)
        self._point: Point | None = None
        self._tally: Tally | None = None
        self._live = Live(self, console=console, refresh_per_second=2)

    def open(self) -> None:
        """Start to redraw."""
        self._live.start()

    def close(self) -> None:
        """Stop to redraw; the last table stays on the screen."""
        self._live.stop()

    def notify(self, line: str) -> None:
        """Add an event below the table."""
        self._events.append(f"{time.time() - self._started:6.1f}s {line}")

    def show(self, point: Point, tally: Tally | None) -> None:
        """Draw these figures at the next refresh."""
        self._point, self._tally = point, tally

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = [] if self._point is None else console.render_lines(self._table(self._point), options)
        height = options.size.height
        room = max(height - len(table), EVENT_LINES)
        events: list[list[Segment]] = []
        for event in reversed(self._events):  # rich would cut the end, where the newest events are
            lines = console.render_lines(Text(event), options)
            if events and len(lines) + len(events) > room:
                break
            events = lines + events
        for line in (*table[: max(0, height - len(events))], *events):
            yield from line
            yield Segment.line()

    def _table(self, point: Point) -> Table:
        table = Table(title=f"{self._title}  {time.time() - self._started:.0f} s", title_justify="left")
        for heading in ("objectives", "now", "replicas", "knobs"):
            table.add_column(heading)
        objectives = Text("\n").join(
            Text(f"{format_objective(item)} {item.state}", style=_STYLES.get(item.state, ""))
            for item in point.objectives
        )
        table.add_row(objectives, _now(point, self._tally), _replicas(point), _knobs(point))
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
        "  ".join(f"{name} {format_ms(value)}" for name, value in point.quantiles.items())
        or "no latency yet",
        f"waiting {point.waiting:.0f}, running {point.running:.0f}",
        f"hit rate {'-' if point.hit_rate is None else f'{point.hit_rate:.0%}'}",
        f"tuning {point.tuning}" + (f" ({', '.join(point.holds)})" if point.holds else ""),
    ]
    if tally is not None:
        lines.append(f"sent {tally.offered}, ended {len(tally.results)}")
    return "\n".join(lines)


def _replicas(point: Point) -> str:
    return "\n".join(
        f"{replica.name} {'ready' if replica.ready else 'not ready'}, generation {replica.generation}"
        + (f", {replica.restarts} restarts" if replica.restarts else "")
        for replica in point.replicas
    )


def _knobs(point: Point) -> str:
    return "\n".join(f"{name} {_by_replica(point, name)}" for name in SHOWN_KNOBS)


def display_for(title: str, started: float, console: Console) -> Display:
    """A live table if the console is a terminal, plain lines otherwise."""
    if console.is_terminal:
        return LiveTable(title, started, console)
    return Lines(started, lambda line: print(line, flush=True))
