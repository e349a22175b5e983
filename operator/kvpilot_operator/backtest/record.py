"""Runs ``kvpilot record``: reads from Prometheus what a deployment was offered, and writes a recording."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from kvpilot_engine.contract import config_errors
from kvpilot_engine.contract import metrics as names
from kvpilot_operator.adapters.metrics.prometheus import PrometheusSource, selector
from kvpilot_operator.adapters.metrics.sources import source_of
from kvpilot_operator.backtest.recording import Interval, Recording, StepWork, lines_of, recording_of
from kvpilot_operator.options import OptionError, check_files, write_file
from kvpilot_operator.ports import MetricsError
from kvpilot_operator.resource.fields import DNS_LABEL
from kvpilot_operator.resource.times import duration_s, from_rfc3339
from kvpilot_operator.status.snapshot import Key

PROGRAM = "kvpilot record"

POINTS = 5000
"""Intervals of one query; Prometheus refuses more than 11,000 points."""

TIMEOUT_S = 60.0
"""Longest wait for one answer, s."""

MAX_INTERVALS = 100_000

SERIES: Mapping[str, str] = {
    "arrivals": names.ARRIVALS_TOTAL,
    "prompt": names.QUERY_TOKENS_TOTAL,
    "cached": names.CEILING_TOKENS_TOTAL,
    "output": names.OUTPUT_TOKENS_TOTAL,
}
"""Counter of each figure. What an infinite cache would serve is recorded: the cache is part of the replay."""

WORK: Mapping[str, str] = {
    "hit": names.HIT_TOKENS_TOTAL,
    "steps": names.STEPS_TOTAL,
    "rows": names.STEP_ROWS_TOTAL,
    "busy": names.STEP_BUSY_SECONDS_TOTAL,
}
"""Counters of which a device is calibrated; an interval without them is whole all the same."""

Totals = dict[str, dict[float, float]]
"""Increase by figure and by the end of its interval, s since the epoch."""


@dataclass(frozen=True)
class RecordOptions:
    """Options of the command line. ``since`` and ``until`` are durations before now or RFC 3339 times."""

    name: str
    namespace: str
    url: str
    out: Path
    since: str = "24h"
    until: str = "0s"
    step: float = 60.0
    token_file: str = ""
    ca_file: str = ""


def run_record(options: RecordOptions) -> int:
    """Write the recording. Exit code 0 with one, gaps included; 1 if the source never answers or the file
    cannot be written; 2 for invalid input, and if the source has no data of the resource."""
    try:
        check_files({}, {"--out": options.out})
        for option, path in (("--token-file", options.token_file), ("--ca-file", options.ca_file)):
            _check_readable(option, path)
        start, end = _span(options, time.time())
        recording, silent = asyncio.run(record(options, start, end))
    except (OptionError, MetricsError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1 if isinstance(error, MetricsError) else 2
    if silent is not None:
        print(f"{PROGRAM}: {silent}; what it did not answer for is a gap", file=sys.stderr)
    print("\n".join(_reported(recording)))
    if not write_file(PROGRAM, options.out, "".join(f"{line}\n" for line in lines_of(recording))):
        return 1
    print(f"recording   {options.out}; replay it with `kvpilot backtest --trace {options.out}`")
    return 0


def _check_readable(option: str, path: str) -> None:
    """Refuse a file that cannot be read before anything is asked.

    Raises:
        OptionError: it cannot.
    """
    if not path:
        return
    try:
        Path(path).read_bytes()
    except OSError as error:
        raise OptionError(f"{option}: cannot be read: {error.strerror}, got {path}") from None


def _span(options: RecordOptions, now: float) -> tuple[float, float]:
    """Start and end of the recording, whole steps apart, in whole s since the epoch.

    Raises:
        OptionError: a value is invalid.
    """
    for option, text in (("NAME", options.name), ("--namespace", options.namespace)):
        if not DNS_LABEL.fullmatch(text):
            raise OptionError(f"{option}: must be a DNS label such as chat, got {text[:60]!r}")
    if not (5 <= options.step <= 3600 and options.step == int(options.step)):
        raise OptionError(f"--step: must be a whole number from 5 to 3600, got {options.step:g}")
    start, end = (
        math.floor(_moment(option, text, now))
        for option, text in (("--since", options.since), ("--until", options.until))
    )
    count = int((end - start) // options.step)
    if not 1 <= count <= MAX_INTERVALS:
        raise OptionError(
            f"--since: must be 1 to {MAX_INTERVALS} steps of {options.step:g} s before --until, got {count}"
        )
    return float(end - count * options.step), float(end)


def _moment(option: str, text: str, now: float) -> float:
    try:
        return now - duration_s(text)
    except ValueError:
        pass
    try:
        return from_rfc3339(text)
    except ValueError:
        raise OptionError(
            f"{option}: must be a duration before now (24h) or an RFC 3339 time, got {text}"
        ) from None


async def record(options: RecordOptions, start: float, end: float) -> tuple[Recording, MetricsError | None]:
    """Read the counters of all engines of the resource.

    Returns:
        the recording, and why the source did not answer for a part of it; None if it always did.

    Raises:
        OptionError: the URL is invalid, or there is no data of the resource.
        MetricsError: the source never answers.
    """
    try:
        given = source_of("prometheus", options.url, options.token_file, options.ca_file)
    except ValidationError as error:
        why = config_errors(error)[0].removeprefix("url: ").removeprefix("Value error, ")
        raise OptionError(f"--url: {why}") from None
    source = PrometheusSource(given, TIMEOUT_S)
    try:
        totals, silent = await _totals(source, Key(options.namespace, options.name), start, end, options.step)
    finally:
        source.close()
    resource = f"{options.namespace}/{options.name}"
    intervals = _intervals(totals, start, end, options.step)
    if all(interval.gap for interval in intervals):
        raise OptionError(f"{resource}: {options.url} has no data of its engines in that time")
    return recording_of(resource, start, options.step, intervals), silent


async def _totals(
    source: PrometheusSource, key: Key, start: float, end: float, step: float
) -> tuple[Totals, MetricsError | None]:
    """The increases of each figure; those of a part of the time for which the source is silent are absent.

    Raises:
        MetricsError: it is silent for all of it.
    """
    queries = _queries(key, step)
    found: Totals = {figure: {} for figure in queries}
    silent, answered, at = None, False, start + step
    while at <= end + 1e-6:
        last = min(end, at + (POINTS - 1) * step)
        try:
            for figure, query in queries.items():
                for row in await source.query_range(query, at, last, step):
                    found[figure] |= {round(float(when), 3): float(value) for when, value in row["values"]}
            answered = True
        except MetricsError as error:
            silent = error
        at = last + step
    if silent is not None and not answered:
        raise silent
    return found, silent


def _queries(key: Key, step: float) -> dict[str, str]:
    """The increase of each figure. Where two servers scrape the same pod, one of them counts."""
    match = selector([key])
    queries = {figure: f"{name}{{{match}}}" for figure, name in {**SERIES, **WORK}.items()}
    queries["answered"] = f'{names.REQUESTS_TOTAL}{{{match},outcome="{names.Outcome.OK}"}}'
    queries["shed"] = f'{names.REQUESTS_TOTAL}{{{match},outcome="{names.Outcome.SHED}"}}'
    return {
        figure: f"sum(max by (pod_uid, tier) (increase({query}[{step:g}s])))"  # only hits have a tier
        for figure, query in queries.items()
    }


def _intervals(totals: Totals, start: float, end: float, step: float) -> list[Interval]:
    found = []
    for index in range(round((end - start) / step)):
        when = round(start + (index + 1) * step, 3)
        figures = {figure: by_time.get(when) for figure, by_time in totals.items()}
        if any(number is None for figure, number in figures.items() if figure not in WORK):
            found.append(Interval(index * step, gap=True))
            continue
        known = {figure: number for figure, number in figures.items() if number is not None}
        found.append(_interval(index * step, known))
    return found


def _interval(at: float, total: Mapping[str, float]) -> Interval:
    admitted = max(total["arrivals"] - total["shed"], 1e-9)
    answered = max(total["answered"], 1e-9)
    if total["arrivals"] <= 0:
        return Interval(at)
    prompt = max(1.0, total["prompt"] / admitted)
    return Interval(
        at,
        arrivals=total["arrivals"],
        prompt=prompt,
        cached=min(prompt, total["cached"] / admitted),
        output=max(1.0, total["output"] / answered),
        work=_work(admitted, answered, total),
    )


def _work(admitted: float, answered: float, total: Mapping[str, float]) -> StepWork | None:
    if not WORK.keys() <= total.keys():
        return None
    return StepWork(admitted, answered, **{figure: total[figure] for figure in WORK})


def _reported(recording: Recording) -> list[str]:
    known = [item for item in recording.intervals if not item.gap]
    arrivals = sum(item.arrivals for item in known)
    seconds = len(known) * recording.step
    gaps = [f"gap         no data from {begin:.0f} s to {end:.0f} s" for begin, end in recording.gaps]
    return [
        f"resource    {recording.resource} from {recording.start}",
        f"intervals   {len(known)} of {recording.step:g} s",
        f"arrivals    {arrivals:.0f}, {arrivals / seconds:.2f} requests/s in the mean",
        *gaps,
    ]
