"""The device of real engines, from the counters that they publish."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kvpilot_operator.backtest.devices import Device
from kvpilot_operator.backtest.recording import Interval, Recording, StepWork
from kvpilot_operator.tuning.observation import Counts

TERMS = {
    "base_s": "steps",
    "row_s": "rows",
    "context_s": "context of rows",
    "prefill_s": "computed prompt tokens",
    "attend_s": "context of prompts",
}
"""Costs of a `Device` and what each is paid for, in the order of a window's quantities."""

MIN_SHARE = 1e-6
"""Share of the squares of a quantity that the others must leave unexplained."""

MIN_INTERVALS = 2 * len(TERMS)
"""Of a recording: one half is fitted, the other half is the check."""

MAX_ERROR = 0.2
"""Share of the time in steps by which the check may miss."""


@dataclass(frozen=True)
class Calibration:
    """The device of a recording.

    Attributes:
        intervals: those that it is fitted to.
        error: a fit to every other interval misses the time in steps of the others by this share of it.
    """

    device: Device
    intervals: int
    error: float


def recorded_device(recording: Recording) -> Calibration:
    """The device on which the recorded engines ran, and what their cache served of what it could.

    Its steps are those of a mean replica: sums over replicas of one kind are linear in the costs, whatever
    their number. Each replica wanders around it as every device of a backtest does.

    Raises:
        ValueError: the recording does not tell: one clause that says what is missing.
    """
    known = ((item, item.work) for item in recording.intervals if item.work is not None)
    windows = [window for item, work in known if work.steps > 0 and _tells(window := _window(item, work))]
    if len(windows) < MIN_INTERVALS:
        raise ValueError(
            f"at least {MIN_INTERVALS} intervals with steps of the engines are needed, it has {len(windows)}"
        )
    device = calibrated(windows)
    error = _missed(calibrated(windows[::2]), windows[1::2])
    if error > MAX_ERROR:
        raise ValueError(
            f"a fit to half of its intervals misses the time in steps of the others by {error:.0%}, "
            f"allowed are {MAX_ERROR:.0%}"
        )
    ceiling = sum(window.ceiling_tokens or 0.0 for window in windows)
    hits = min(1.0, sum(window.hit_tokens or 0.0 for window in windows) / ceiling) if ceiling else 1.0
    return Calibration(replace(device, noise=Device.noise, hits=hits), len(windows), error)


def _window(interval: Interval, work: StepWork) -> Counts:
    return Counts(
        arrivals=work.admitted,
        outcomes={"ok": work.answered},
        query_tokens=interval.prompt * work.admitted,
        hit_tokens=work.hit,
        ceiling_tokens=interval.cached * work.admitted,
        output_tokens=interval.output * work.answered,
        steps=work.steps,
        step_rows=work.rows,
        busy_seconds=work.busy,
    )


def busy_of(device: Device, window: Counts) -> float:
    """Time in steps that a device takes for what an engine did in a window, s."""
    terms = zip(TERMS, _quantities(window), strict=True)
    busy_s: float = sum(getattr(device, cost) * number for cost, number in terms)
    return busy_s


def _missed(device: Device, windows: Sequence[Counts]) -> float:
    """By which share of it a device misses the time in steps of windows, in the mean over that time."""
    wrong = sum(abs(busy_of(device, window) - window.busy_seconds) for window in windows)
    return wrong / sum(window.busy_seconds for window in windows)


def _tells(window: Counts) -> bool:
    counted = window.computed is not None and window.output_tokens is not None
    return counted and window.arrivals > 0 and window.completed > 0 and window.busy_seconds > 0


def calibrated(windows: Iterable[Counts]) -> Device:
    """The device whose steps take what an engine's steps took in each of these windows.

    A window of w steps with r rows in sum, d of them decoding, over requests of p prompt and a answer tokens
    in the mean, of whose prompts h tokens were cached and c computed, m and n over all requests, took ``base
    w + row r + context (d (p + a / 2) + m) + prefill n + attend n (h + c / 2)``. The five costs are fitted by
    least squares, none below 0; each window weighs as its time, because the scatter of a sum grows with it.

    Args:
        windows: of one engine or the sums of several; what arrives in a window is computed in it, but for a
            queue that grows or shrinks meanwhile. Those in which no request arrived or ended, and those
            without a count of tokens, are left out.

    Raises:
        ValueError: there are fewer windows than costs, or they do not separate the costs.
    """
    found = [(item, _quantities(item)) for item in windows if _tells(item)]
    if len(found) < len(TERMS):
        raise ValueError(f"windows with steps: at least {len(TERMS)} are needed, got {len(found)}")
    weights = [1.0 / item.busy_seconds for item, _ in found]
    rows = [quantities for _, quantities in found]
    costs = _non_negative(rows, [item.busy_seconds for item, _ in found], weights)
    return Device(**dict(zip(TERMS, costs, strict=True)), noise=0.0)


def _quantities(window: Counts) -> tuple[float, ...]:
    """Those of `TERMS`, each summed over the window."""
    query, hit, output = window.query_tokens or 0.0, window.hit_tokens or 0.0, window.output_tokens or 0.0
    context = query / window.arrivals + output / window.completed / 2
    decodes = output - window.arrivals  # the first token of an answer is that of the prefill
    computed = query - hit
    attended = (hit + computed / 2) / window.arrivals
    return (
        window.steps,
        window.step_rows,
        context * decodes + hit,
        computed,
        computed * attended,
    )


def _non_negative(
    rows: Sequence[Sequence[float]], wanted: Sequence[float], weights: Sequence[float]
) -> list[float]:
    """The x that minimises the weighted squares of ``rows x - wanted``; what would be below 0 is left out.

    Raises:
        ValueError: a column is zero throughout, or depends on the others.
    """
    columns = list(zip(*rows, strict=True))

    def product(a: Sequence[float], b: Sequence[float]) -> float:
        return sum(w * x * y for w, x, y in zip(weights, a, b, strict=True))

    sizes = [math.sqrt(product(column, column)) for column in columns]
    if nothing := [name for name, size in zip(TERMS.values(), sizes, strict=True) if size <= 0]:
        raise ValueError(f"windows: they show no {', '.join(nothing)}")
    units = [[value / size for value in column] for column, size in zip(columns, sizes, strict=True)]
    used = list(range(len(units)))
    while True:
        gram = [[product(units[i], units[j]) for j in used] for i in used]
        found = _solved(gram, [product(units[i], wanted) for i in used])
        if min(found) >= 0.0:
            break
        del used[found.index(min(found))]
    costs = dict(zip(used, found, strict=True))
    return [costs.get(i, 0.0) / size for i, size in enumerate(sizes)]


def _solved(gram: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """The solution of normal equations, by elimination; their diagonal is 1.

    Raises:
        ValueError: they are singular.
    """
    lines = [[*line, value] for line, value in zip(gram, right, strict=True)]
    for i, line in enumerate(lines):
        if line[i] < MIN_SHARE:
            raise ValueError(f"windows: they are too alike to separate {', '.join(TERMS.values())}")
        for other in lines:
            if other is not line:
                factor = other[i] / line[i]
                other[:] = [a - factor * b for a, b in zip(other, line, strict=True)]
    return [line[-1] / line[i] for i, line in enumerate(lines)]
