"""Runs ``kvpilot up``: checks all input, runs the session, writes the report, prints the check."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog
from rich.console import Console

from kvpilot_operator.load.chat import ChatShape, ChatWorkload
from kvpilot_operator.load.results import format_summary
from kvpilot_operator.load.trace import TraceWorkload
from kvpilot_operator.load.workload import LoadError, LoadPhase, Rise, Workload
from kvpilot_operator.local.cluster import memory_limit
from kvpilot_operator.local.display import display_for
from kvpilot_operator.local.figures import figures_of
from kvpilot_operator.local.report import report_html
from kvpilot_operator.local.session import RunOptions, RunResult, Session, print_steps
from kvpilot_operator.local.state import BusyError, StateDirectory
from kvpilot_operator.local.watch import document_of
from kvpilot_operator.options import TRACE_OPTIONS, OptionError, check_files, check_unused, write_file
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.resource.model import KVCacheDeployment
from kvpilot_operator.resource.resolve import policy_of
from kvpilot_operator.router.proxy import PortError, Router

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2

CHAT = ChatShape(system_prompts=4, system_tokens=256, turns=4, user_tokens=32, output_tokens=48)
CALM_S, CALM_IN_FLIGHT = 45.0, 0.5
RISE_S, RISE_IN_FLIGHT = 245.0, 1.0
"""The chat load without a rate: a calm phase, then a rise to saturation.

Both rates are sized to the machine, as requests in flight (see `LoadPhase`). The calm phase breaches nothing
even if the machine becomes half as fast after it was measured. The rise is long enough for a slow machine to
drain the backlog of an experiment; a passed check ends earlier."""


MIN_START_TIMEOUT_S = 600.0
"""Minimum timeout for the start of the engines before a load with a duration, s: a large model takes
minutes to load, and the duration does not include them."""


@dataclass(frozen=True)
class UpOptions:
    """Options of the command line; ``given`` names those that are not defaults."""

    manifest: Path
    load: Literal["chat", "trace"] | None
    trace: Path | None
    speed: float
    shrink: int
    rate: float | None
    duration: float | None
    mode: Literal["Off", "Recommend", "Auto"] | None
    tuning: bool
    check: bool
    report: Path | None
    json_out: Path | None
    port: int
    fresh: bool
    pace_scale: float
    given: frozenset[str] = frozenset()


def workload_of(options: UpOptions) -> Workload | None:
    """The load that the options ask for; None without one.

    Raises:
        LoadError, OptionError: an option or the trace is invalid.
    """
    if options.duration is not None and not 0 < options.duration < math.inf:
        raise OptionError(f"--duration: must be above 0 and finite, got {options.duration:g}")
    if options.check and not options.tuning:
        raise OptionError("--check: cannot go with --tuning off, which makes no change")
    if options.load == "trace" and options.trace is None:
        raise OptionError("--load trace: needs --trace FILE")
    if options.trace is not None:
        if options.load == "chat":
            raise OptionError("--trace: cannot go with --load chat")
        check_unused(options.given, ["rate"], "cannot go with --trace, which has its own arrival times")
        return TraceWorkload(
            options.trace, speed=options.speed, shrink=options.shrink, seconds=options.duration
        )
    check_unused(options.given, TRACE_OPTIONS, "needs --trace FILE")
    if options.load is None:
        check_unused(options.given, ["rate"], "needs --load chat")
        if options.check:
            raise OptionError("--check: needs --load or --trace")
        return None
    if options.rate is not None:
        return ChatWorkload([LoadPhase("chat", options.duration or math.inf, rate=options.rate)], CHAT)
    seconds = CALM_S + RISE_S if options.duration is None else options.duration
    calm = seconds * CALM_S / (CALM_S + RISE_S)
    return ChatWorkload(
        [
            LoadPhase("calm", calm, in_flight=CALM_IN_FLIGHT),
            Rise("rise", seconds - calm, in_flight=RISE_IN_FLIGHT),
        ],
        CHAT,
    )


def run_up(options: UpOptions) -> int:
    """Check all input, then run; the exit code. Invalid input is reported before any engine starts."""
    try:
        manifest = document_of(options.manifest, options.mode)
        resource = KVCacheDeployment.parse(manifest, str(options.manifest))
        policy_of(resource.spec, options.pace_scale)
        memory_limit(resource.spec)
        workload = workload_of(options)
        check_files(
            {"MANIFEST": options.manifest, "--trace": options.trace},
            {"--json": options.json_out, "--report": options.report},
        )
    except (ManifestError, LoadError, OptionError) as error:
        return _refuse(error)
    state = StateDirectory(resource.metadata.name)
    try:
        state.open()
    except BusyError as error:
        return _refuse(error)
    try:
        result = asyncio.run(_run(options, manifest, workload, state))
    except PortError as error:
        return _refuse(error)
    finally:
        state.close()
    if result.problem:
        return _refuse(result.problem, EXIT_BAD_INPUT if result.bad_input else EXIT_FAILED)
    return conclude(options, resource, result, state.path)


def _refuse(error: object, code: int = EXIT_BAD_INPUT) -> int:
    for line in str(error).splitlines():
        print(f"kvpilot up: {line}", file=sys.stderr)
    return code


async def _run(
    options: UpOptions, manifest: dict[str, Any], workload: Workload | None, state: StateDirectory
) -> RunResult:
    """Listen on the port, then run the session.

    Raises:
        PortError: the port cannot be listened on; the state directory is unchanged.
    """
    router = Router("127.0.0.1", options.port)
    await router.start()
    # After listening, so that a run that cannot start does not delete the state of an earlier one.
    state.clear(fresh=options.fresh or options.check)
    _log_to(state.path / "kvpilot.log")
    console = Console()
    display = display_for(f"kvpilot {manifest['metadata']['name']}", time.time(), console)
    run = RunOptions(
        manifest_path=options.manifest,
        mode=options.mode,
        workload=workload,
        check=options.check,
        seconds=options.duration if workload is None else None,
        pace_scale=options.pace_scale,
        off="" if options.tuning else "kvpilot up runs with --tuning=off",
        start_s=None if options.duration is None else max(options.duration, MIN_START_TIMEOUT_S),
    )
    return await Session(manifest, run, state, router, display).run()


def conclude(options: UpOptions, resource: KVCacheDeployment, result: RunResult, directory: Path) -> int:
    """Print and write the figures, the report and the result of the check; the exit code."""
    if result.load is not None:
        print("\n".join(format_summary(result.load)))
    figures = figures_of(resource, result)
    written = True
    if options.json_out is not None:
        written = write_file("kvpilot up", options.json_out, json.dumps(figures, indent=1) + "\n")
        if written:
            print(f"figures: {options.json_out}")
    if result.points and (result.load is not None or options.report is not None):
        report = options.report or directory / "report.html"
        if write_file("kvpilot up", report, report_html(figures, checked=options.check)):
            print(f"report: {report.resolve()}")
        else:
            written = False
    if not options.check:
        return EXIT_OK if written else EXIT_FAILED
    check = result.check
    assert check is not None
    print("check:")
    print_steps(result, print)
    print(f"check {'passed' if check.cured else 'failed'}: {check.reason}")
    return EXIT_OK if check.cured and written else EXIT_FAILED


def _log_to(path: Path) -> None:
    """Write the log as JSON lines to a file, because the terminal shows the display."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(default=str),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=path.open("a", buffering=1)),
        cache_logger_on_first_use=False,
    )
