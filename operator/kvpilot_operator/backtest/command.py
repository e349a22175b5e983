"""Runs ``kvpilot backtest``: checks the options, plays the runs on all cores and prints the figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from kvpilot_operator.backtest import planted
from kvpilot_operator.backtest.contest import (
    DEFAULTS,
    GRID,
    START_S,
    TUNED,
    ContestRun,
    Row,
    best,
    contest,
    parse_against,
    parse_loads,
    train,
)
from kvpilot_operator.backtest.faults import parse_faults
from kvpilot_operator.backtest.parallel import in_parallel
from kvpilot_operator.backtest.recording import described_gaps, is_recording, read_recording
from kvpilot_operator.backtest.report import report_html
from kvpilot_operator.backtest.scenes import DeviceName, LoadSpec, Scene, scene_of
from kvpilot_operator.backtest.tables import lines_of, table
from kvpilot_operator.load.workload import LoadError
from kvpilot_operator.options import OptionError, check_files, check_unused, write_file
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.resource.load import load_document
from kvpilot_operator.resource.model import KVCacheDeployment
from kvpilot_operator.tuning.pace import PaceName

PROGRAM = "kvpilot backtest"

MAX_RUNS, MAX_FACTOR = 100_000, 100.0

AGAINST = "do-nothing,hpa,keda,always-max"
"""Baselines without ``--against``."""

CONTEST_OPTIONS = (
    "device",
    "against",
    "faults",
    "seeds",
    "start_seconds",
    "scale",
    "duration",
    "tune",
    "report",
)
PLANTED_OPTIONS = ("replicas", "verbose")
"""Options, by their names in Python, that only the one or the other kind of run uses."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class BacktestOptions:
    """Options of the command line; ``given`` names those that are not defaults."""

    manifest: Path
    trace: Path | None = None
    load: str | None = None
    aa: int | None = None
    regression: tuple[float, int] | None = None
    gain: tuple[float, int] | None = None
    device: DeviceName | None = None
    against: str = AGAINST
    faults: str = ""
    seeds: int = 5
    seed: int = 1
    start_seconds: float = START_S
    scale: float | None = None
    duration: float | None = None
    tune: bool = False
    replicas: int | None = None
    sticky: bool = False
    pace: PaceName | None = None
    json_out: Path | None = None
    report: Path | None = None
    verbose: bool = False
    given: frozenset[str] = frozenset()


def run_backtest(options: BacktestOptions) -> int:
    """Play the runs; the exit code is 2 for invalid input."""
    try:
        check_files(
            {"MANIFEST": options.manifest, "--trace": options.trace},
            {"--json": options.json_out, "--report": options.report},
        )
        document = load_document(options.manifest)
        KVCacheDeployment.parse(document, str(options.manifest))
        if _kind(options) in ("trace", "load"):
            return _contest(options, document)
        return _planted(options, document)
    except (ManifestError, OptionError, LoadError) as error:
        print("\n".join(f"{PROGRAM}: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2


def _kind(options: BacktestOptions) -> str:
    """The one kind of run that is asked for.

    Raises:
        OptionError: none or several are.
    """
    asked = {
        "trace": options.trace,
        "load": options.load,
        "aa": options.aa,
        "regression": options.regression,
        "gain": options.gain,
    }
    found = [kind for kind, given in asked.items() if given is not None]
    if len(found) != 1:
        got = " and ".join(f"--{kind}" for kind in found) or "none of them"
        names = ", ".join(f"--{kind}" for kind in asked)
        raise OptionError(f"one of {names} is required, got {got}")
    return found[0]


# Planted changes


def _planted(options: BacktestOptions, document: Mapping[str, Any]) -> int:
    check_unused(options.given, CONTEST_OPTIONS, "needs --trace or --load")
    kind, factor, runs = _planted_runs(options)
    jobs = planted.runs_of(
        document,
        kind,
        factor,
        runs,
        replicas=options.replicas,
        pace=options.pace,
        sticky=options.sticky,
        seed=options.seed,
    )
    results = list(_progress(in_parallel(planted.play, jobs), len(jobs)))
    if options.verbose:
        for job, result in zip(jobs, results, strict=True):
            print(f"seed {job.seed}, load {job.utilisation:g} of the capacity\n{result.report}")
    figures = planted.summary(results)
    print("\n".join(_planted_lines(figures)))
    return _written(options.json_out, json.dumps(figures, indent=1) + "\n", "figures")


def _planted_runs(options: BacktestOptions) -> tuple[planted.Planted, float, int]:
    """What is planted, its factor, and the number of runs.

    Raises:
        OptionError: a value is out of bounds.
    """
    if options.aa is not None:
        kind, factor, runs = "aa", 1.0, options.aa
    elif options.regression is not None:
        kind, (factor, runs) = "regression", options.regression
    else:
        assert options.gain is not None
        kind, (factor, runs) = "gain", options.gain
    if not 1 <= runs <= MAX_RUNS:
        raise OptionError(f"--{kind}: runs must be from 1 to {MAX_RUNS}, got {runs}")
    if not 1.0 <= factor <= MAX_FACTOR:
        raise OptionError(f"--{kind}: the factor must be from 1 to {MAX_FACTOR:g}, got {factor:g}")
    if options.replicas is not None and not 2 <= options.replicas <= 1000:
        raise OptionError(
            f"--replicas: must be from 2 to 1000, as one replica has no controls, got {options.replicas}"
        )
    return kind, factor, runs  # type: ignore[return-value]  # one of the three


def _planted_lines(figures: Mapping[str, Any]) -> Iterator[str]:
    runs = figures["runs"]
    for name, number in figures.items():
        if name == "median_s":
            yield f"{'median time':14} {'-' if number is None else f'{number:.0f} s'}"
        elif name == "runs":
            yield f"{name:14} {number}"
        else:
            yield f"{name.replace('_', ' '):14} {number} ({number / runs:.1%})"


# Comparisons


def _contest(options: BacktestOptions, document: dict[str, Any]) -> int:
    check_unused(options.given, PLANTED_OPTIONS, "needs --aa, --regression or --gain")
    _check_contest(options)
    if options.pace is not None:
        spec = document["spec"]
        tuning = {**(spec.get("tuning") or {}), "pace": options.pace}
        document = {**document, "spec": {**spec, "tuning": tuning}}
    against, faults = parse_against(options.against), parse_faults(options.faults)
    loads = (None,) if options.load is None else parse_loads(options.load)
    if len(loads) > 1 and options.report is not None:
        raise OptionError(f"--report: needs one load, got {len(loads)}")
    runs = [
        ContestRun(
            document,
            scene_of(
                document, LoadSpec(load, options.trace, options.scale, options.duration), options.device
            ),
            TUNED,
            "",
            options.seed,
            start_s=options.start_seconds,
            faults=faults,
            sticky=options.sticky,
        )
        for load in loads
    ]
    parameters = {**DEFAULTS, **(_trained(runs[0], against) if options.tune else {})}
    found, pages = zip(*(_compared(options, run, against, parameters) for run in runs), strict=True)
    figures = found[0] if len(found) == 1 else {"loads": found}
    code = _written(options.json_out, json.dumps(figures, indent=1) + "\n", "figures")
    return code or _written(options.report, pages[0], "report")


def _compared(
    options: BacktestOptions, run: ContestRun, against: tuple[str, ...], parameters: Mapping[str, str]
) -> tuple[dict[str, Any], str]:
    """Play one load and print its table; returns rows with settings, and the report ("" without one)."""
    described = _described(run.scene)
    print("\n".join(described))
    seeds = range(options.seed, options.seed + options.seeds)
    runs = len(seeds) * (1 + len(against))
    rows = list(_progress(contest(run, against, seeds, parameters), runs))
    lines = lines_of(rows)
    print("\n".join(table(lines)))
    page = report_html(lines, rows, described) if options.report is not None else ""
    figures = {"rows": [_row(row) for row in rows], "settings": _settings(options, run.scene, parameters)}
    return figures, page


def _check_contest(options: BacktestOptions) -> None:
    bounds: tuple[tuple[str, float | None, float, float], ...] = (
        ("--seeds", options.seeds, 1, 10_000),
        ("--start-seconds", options.start_seconds, 0, 3600),
        ("--scale", options.scale, 1e-3, 1e5),
        ("--duration", options.duration, 300, 7 * 86_400),
    )
    for name, number, low, high in bounds:
        if number is not None and not low <= number <= high:
            raise OptionError(f"{name}: must be from {low:g} to {high:g}, got {number:g}")


def _described(scene: Scene) -> list[str]:
    size = f"{scene.least}" if scene.least == scene.most else f"{scene.least} to {scene.most}"
    scale = f", {scene.scale:.1f} requests for each recorded one" if scene.load.trace is not None else ""
    trace = scene.load.trace
    gaps = described_gaps(read_recording(trace)) if trace is not None and is_recording(trace) else []
    return [
        f"load {scene.load.title}: {scene.seconds:.0f} s, {scene.mean:.0f} requests/s in the mean, "
        f"{scene.peak:.0f} in the busiest minute{scale}",
        f"deployment: {size} replicas of {scene.capacity:.0f} requests/s each with the given knobs",
        _device_line(scene),
        *gaps,
    ]


def _device_line(scene: Scene) -> str:
    device = scene.device
    origin = {"recorded": "calibrated from the recording", "fitting": "fitted to the objectives"}
    cache = (
        f"; the cache serves {device.hits:.0%} of what it could" if scene.device_name == "recorded" else ""
    )
    return (
        f"device: {origin[scene.device_name]} ({scene.device_why}): a step {1e3 * device.base_s:.2g} ms, "
        f"each row {1e3 * device.row_s:.2g} ms, a prompt token {1e3 * device.prefill_s:.2g} ms, "
        f"a token that a row attends to {1e6 * device.context_s:.2g} us, one that a prompt token attends to "
        f"{1e6 * device.attend_s:.2g} us{cache}"
    )


def _trained(run: ContestRun, against: tuple[str, ...]) -> dict[str, str]:
    count = sum(len(GRID.get(name, ())) for name in against)
    found = list(_progress(train(run, against), count, "candidates"))
    for name, given, points in found:
        print(f"training    {name:12} {given:12} score {points:.1f}")
    return best(found)


def _row(row: Row) -> Row:
    return {name: item for name, item in row.items() if name not in ("trials", "parameters")}


def _settings(options: BacktestOptions, scene: Scene, parameters: Mapping[str, str]) -> dict[str, Any]:
    return {
        "load": scene.load.title,
        "seconds": scene.seconds,
        "scale": scene.scale,
        "device": {"name": scene.device_name, "why": scene.device_why, **asdict(scene.device)},
        "start_seconds": options.start_seconds,
        "faults": options.faults,
        "pace": "Fast" if scene.pace.scrape < 10 else "Standard",
        "parameters": {name: parameters[name] for name in parse_against(options.against)},
        "trained": options.tune,
    }


# Output


def _progress(items: Iterable[Item], count: int, what: str = "runs") -> Iterator[Item]:
    """Pass items on and say on stderr how many there were; in a terminal in one line that is rewritten."""
    terminal = sys.stderr.isatty()
    every = 1 if terminal else max(1, count // 10)
    for done, item in enumerate(items, 1):
        if done % every == 0 or done == count:
            line = f"{done}/{count} {what}"
            print(
                f"\r{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True
            )
        yield item
    if terminal:
        print(file=sys.stderr)


def _written(path: Path | None, text: str, what: str) -> int:
    if path is not None:
        if not write_file(PROGRAM, path, text):
            return 1
        print(f"{what:14} {path}")
    return 0
