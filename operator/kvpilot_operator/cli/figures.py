"""Live figures of replicas from the engines' own metrics pages, for ``kvpilot top``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from kvpilot_operator.adapters.metrics.scrape import History, PageReader
from kvpilot_operator.adapters.metrics.series import IncompleteSeriesError, sample_from
from kvpilot_operator.cli.output import table
from kvpilot_operator.cli.target import CommandError, Target
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.resource.model import KVCacheDeployment
from kvpilot_operator.resource.resolve import objectives_of
from kvpilot_operator.tuning.assess.objectives import hit_rate
from kvpilot_operator.tuning.observation import Counts, Gauges, Sample, Signal

WINDOW_S = 10.0
"""Rates and shares are those of the last so many seconds."""

ALL = "all"


@dataclass(frozen=True)
class Figures:
    """Figures of one replica, or of all; None where there is no data.

    Attributes:
        rate: requests that arrive, 1/s; ``completed`` those that end well.
        attainment: share of the judged requests within the latency edge.
        memory: share of its limit in use, of the tightest kind.
        rows: sequences in a step, on average.
        problem: why there are no figures; "" where there are.
    """

    replica: str
    rate: float | None = None
    completed: float | None = None
    attainment: float | None = None
    waiting: float | None = None
    running: float | None = None
    memory: float | None = None
    hit_rate: float | None = None
    rows: float | None = None
    generation: int | None = None
    problem: str = ""

    def as_json(self) -> dict[str, Any]:
        """For ``-o json``: camelCase."""
        return {"hitRate" if key == "hit_rate" else key: value for key, value in asdict(self).items()}

    def row(self) -> tuple[str, ...]:
        """Cells of the table."""
        if self.problem:
            return (self.replica, *["-"] * 8, self.problem)
        return (
            self.replica,
            _number(self.rate, ".1f"),
            _number(self.completed, ".1f"),
            _number(self.attainment, ".0%"),
            _number(self.waiting, ".0f"),
            _number(self.running, ".0f"),
            _number(self.memory, ".0%"),
            _number(self.hit_rate, ".0%"),
            _number(self.rows, ".1f"),
            "-" if self.generation is None else str(self.generation),
        )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


class Watcher:
    """Looks at the pages of a resource's replicas and keeps what the window needs.

    Args:
        clock: s since the epoch.

    Raises:
        CommandError: the spec is invalid, so that its latency objective is not known.
    """

    def __init__(self, target: Target, clock: Callable[[], float] = time.time) -> None:
        self._target, self._clock = target, clock
        self._histories: dict[str, History] = {}
        self._readers: dict[str, PageReader] = {}
        self._silent: list[str] = []
        try:
            objectives = objectives_of(KVCacheDeployment.parse(target.manifest).spec)
        except ManifestError as error:
            raise CommandError("; ".join(error.lines)) from None
        named = objectives.latency
        self._limit = next((name for name in ("p95", "p99", "p50") if name in named), "")
        self._edge_s = named[self._limit][0] if self._limit else 0.0
        self._signal: Signal = objectives.signal

    def read(self) -> None:
        """Read all pages once.

        Raises:
            CommandError: there is no replica, or this user may not read them.
        """
        pages = self._target.pages()
        if not pages:
            raise CommandError(f"{self._target.key.name} has no replica that serves")
        self._silent = [name for name, text in pages.items() if text is None]
        for gone in self._histories.keys() - pages.keys():
            del self._histories[gone]
        for name, text in pages.items():
            if text is not None:
                values = self._readers.setdefault(name, PageReader()).read(text)
                self._histories.setdefault(name, History()).add(self._clock(), values)

    def figures(self) -> list[Figures]:
        """Figures of each replica by name, then of all of them where there are several."""
        samples: dict[str, Sample] = {}
        found: list[Figures] = []
        for name in sorted({*self._histories, *self._silent}):
            sample = self._sample(name)
            if isinstance(sample, str):
                found.append(Figures(name, problem=sample))
                continue
            samples[name] = sample
            found.append(self._of(name, sample.windows["window"], [sample.gauges]))
        if len(samples) > 1:
            counts = Counts.total(sample.windows["window"] for sample in samples.values())
            found.append(self._of(ALL, counts, [sample.gauges for sample in samples.values()]))
        return found

    def _sample(self, name: str) -> Sample | str:
        """Metrics of a replica, or why there are none."""
        history = self._histories.get(name)
        if name in self._silent or history is None:
            return "does not answer"
        if len(history.times) < 2:
            return "seen once so far"
        increases, covered = history.increase(WINDOW_S)
        try:
            return sample_from({"window": increases}, history.gauges, {"window": covered}, 0.0, covered)
        except IncompleteSeriesError as error:
            return str(error)

    def _of(self, name: str, counts: Counts, gauges: Iterable[Gauges]) -> Figures:
        held = list(gauges)
        seconds = counts.replica_seconds / len(held)
        generations = {item.generation for item in held}
        return Figures(
            replica=name,
            rate=_share(counts.arrivals, seconds),
            completed=_share(counts.completed, seconds),
            attainment=counts.attainment(self._signal, self._edge_s) if self._limit else None,
            waiting=sum(item.waiting for item in held),
            running=sum(item.running for item in held),
            memory=max(item.memory_ratio for item in held),
            hit_rate=hit_rate(counts),
            rows=_share(counts.step_rows, counts.steps),
            generation=generations.pop() if len(generations) == 1 else None,
        )

    def table(self) -> Table:
        """The figures as a table."""
        return table(
            (
                "REPLICA",
                "IN/S",
                "OUT/S",
                f"{self._limit or 'LATENCY'} <= {self._edge_s * 1000:.0f} MS",
                "WAITING",
                "RUNNING",
                "MEMORY",
                "HITS",
                "ROWS",
                "GEN",
            ),
            (item.row() for item in self.figures()),
        )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
