"""What ``kvpilot up`` does once its options are read: check all input, run, report, judge."""

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
from kvpilot_operator.load.command import TRACE_OPTIONS, check_files, check_unused, write_file
from kvpilot_operator.load.results import lines_of
from kvpilot_operator.load.trace import TraceWorkload
from kvpilot_operator.load.workload import LoadError, Phase, Rise, Workload
from kvpilot_operator.local.cluster import memory_limit
from kvpilot_operator.local.display import display_for
from kvpilot_operator.local.figures import figures_of
from kvpilot_operator.local.report import report_html
from kvpilot_operator.local.router import PortError, Router
from kvpilot_operator.local.session import Outcome, RunOptions, Session, told_steps
from kvpilot_operator.local.state import BusyError, StateDirectory
from kvpilot_operator.local.watch import document_of
from kvpilot_operator.spec.errors import ManifestError
from kvpilot_operator.spec.models import KVCacheDeployment
from kvpilot_operator.spec.resolve import policy_of

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2

CHAT = ChatShape(system_prompts=4, system_tokens=256, turns=4, user_tokens=32, output_tokens=48)
CALM_S, CALM_IN_FLIGHT = 45.0, 0.5
RISE_S, RISE_IN_FLIGHT = 245.0, 1.0
"""The chat load without a rate: calm first, then a rise until it hurts. Both are sized to the machine: so
many requests would be in flight, when they begin, if answers went on taking as long as before. Calm breaches
nothing even if the machine becomes twice as slow after it was measured. The rise is long enough to work the
backlog of the experiment off on a slow machine; a cured check ends before that."""


LONGEST_START_S = 600.0
"""Least time that a load with a duration waits for its engines, s: its duration does not count
that, and a large model takes minutes to load."""


@dataclass(frozen=True)
class UpOptions:
    """The command line. ``given``: the fields that it gives itself."""

    manifest: Path
    load: Literal["chat", "trace"] | None
    trace: Path | None
    speed: float
    shrink: int
    rate: float | None
    duration: float | None
    mode: Literal["Off", "Recommend", "Auto"] | None
    check: bool
    report: Path | None
    json_out: Path | None
    port: int
    fresh: bool
    pace_scale: float
    given: frozenset[str] = frozenset()


def workload_of(options: UpOptions) -> Workload | None:
    """The load that was asked for.

    Raises:
        LoadError: for an option or a trace that cannot be used.
    """
    if options.duration is not None and not 0 < options.duration < math.inf:
        raise LoadError(f"--duration: must be above 0 and finite, got {options.duration:g}")
    if options.load == "trace" and options.trace is None:
        raise LoadError("--load trace: needs --trace FILE")
    if options.trace is not None:
        if options.load == "chat":
            raise LoadError("--trace: cannot go with --load chat")
        check_unused(options.given, ["rate"], "cannot go with --trace, whose requests have their own times")
        return TraceWorkload(
            options.trace, speed=options.speed, shrink=options.shrink, seconds=options.duration
        )
    check_unused(options.given, TRACE_OPTIONS, "needs --trace FILE")
    if options.load is None:
        check_unused(options.given, ["rate"], "needs --load chat")
        if options.check:
            raise LoadError("--check: needs --load or --trace")
        return None
    if options.rate is not None:
        return ChatWorkload([Phase("chat", options.duration or math.inf, rate=options.rate)], CHAT)
    seconds = CALM_S + RISE_S if options.duration is None else options.duration
    calm = seconds * CALM_S / (CALM_S + RISE_S)
    return ChatWorkload(
        [
            Phase("calm", calm, in_flight=CALM_IN_FLIGHT),
            Rise("rise", seconds - calm, in_flight=RISE_IN_FLIGHT),
        ],
        CHAT,
    )


def run_up(options: UpOptions) -> int:
    """Run it; the exit code. Everything that can be wrong with the input is told before anything starts."""
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
    except (ManifestError, LoadError) as error:
        return _refuse(error)
    state = StateDirectory(resource.metadata.name)
    try:
        state.open()
    except BusyError as error:
        return _refuse(error)
    try:
        outcome = asyncio.run(_run(options, manifest, workload, state))
    except PortError as error:
        return _refuse(error)
    finally:
        state.close()
    if outcome.problem:
        return _refuse(outcome.problem, EXIT_BAD_INPUT if outcome.bad_input else EXIT_FAILED)
    return conclude(options, resource, outcome, state.path)


def _refuse(error: object, code: int = EXIT_BAD_INPUT) -> int:
    for line in str(error).splitlines():
        print(f"kvpilot up: {line}", file=sys.stderr)
    return code


async def _run(
    options: UpOptions, manifest: dict[str, Any], workload: Workload | None, state: StateDirectory
) -> Outcome:
    """Listen first, then begin.

    Raises:
        PortError: the port cannot be listened on; the state is as it was.
    """
    router = Router("127.0.0.1", options.port)
    await router.start()
    # Only a run that can begin erases what an earlier one left.
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
        start_s=None if options.duration is None else max(options.duration, LONGEST_START_S),
    )
    return await Session(manifest, run, state, router, display).run()


def conclude(options: UpOptions, resource: KVCacheDeployment, outcome: Outcome, directory: Path) -> int:
    """Tell figures, report and verdict; the exit code."""
    if outcome.load is not None:
        print("\n".join(lines_of(outcome.load)))
    figures = figures_of(resource, outcome)
    written = True
    if options.json_out is not None:
        written = write_file("kvpilot up", options.json_out, json.dumps(figures, indent=1) + "\n")
        if written:
            print(f"figures: {options.json_out}")
    if outcome.points and (outcome.load is not None or options.report is not None):
        report = options.report or directory / "report.html"
        if write_file("kvpilot up", report, report_html(figures, checked=options.check)):
            print(f"report: {report.resolve()}")
        else:
            written = False
    if not options.check:
        return EXIT_OK if written else EXIT_FAILED
    verdict = outcome.verdict
    assert verdict is not None
    print("check:")
    told_steps(outcome, print)
    print(f"check {'passed' if verdict.cured else 'failed'}: {verdict.reason}")
    return EXIT_OK if verdict.cured and written else EXIT_FAILED


def _log_to(path: Path) -> None:
    """JSON lines of the loop and of this process go to a file: the terminal shows what matters."""
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
