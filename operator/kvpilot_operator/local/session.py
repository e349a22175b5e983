"""One run of ``kvpilot up``: wires the parts of local mode together and runs them until the end."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from kvpilot_engine.contract.wording import counted
from kvpilot_operator.adapters.engines.kvpilot import EngineAdmin
from kvpilot_operator.adapters.metrics.scrape import ScrapeMetrics
from kvpilot_operator.load.client import Client, RequestError
from kvpilot_operator.load.results import RequestResult
from kvpilot_operator.load.runner import LoadRun
from kvpilot_operator.load.workload import Workload
from kvpilot_operator.local.check import CheckResult, check_run
from kvpilot_operator.local.cluster import LocalCluster
from kvpilot_operator.local.display import Display
from kvpilot_operator.local.recorder import Point, Recorder
from kvpilot_operator.local.replicas import BAD_START, MAX_FAILED_STARTS
from kvpilot_operator.local.state import StateDirectory
from kvpilot_operator.local.watch import watch, watch_overrides
from kvpilot_operator.reconcile.fleet import Fleet
from kvpilot_operator.reconcile.reconciler import Reconciler
from kvpilot_operator.resource.resolve import policy_of
from kvpilot_operator.router.proxy import Backend, Router
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.policy import Policy

log = structlog.get_logger(__name__)

TAIL_S = 12.0
"""Time that a cured run goes on, so that the report shows the effect, s."""

MAX_RUN_S = 365 * 86400.0
"""Limit for an endless load, s."""

WIND_DOWN_S = 10.0
"""Time to wait for answers if the run ends before its load, s."""

LAST_ANSWERS_S = 30.0
"""Time to wait for answers after the last request of a load, s."""


@dataclass(frozen=True)
class RunOptions:
    """What a run does in addition to running the replicas.

    Attributes:
        workload: sent through the router; the run ends with it. None runs until a signal.
        check: end as soon as the check is clear.
        seconds: end after this long in any case.
        off: why the kill switch keeps tuning off; "" while it is on.
        start_s: how long the load waits for all engines to be ready; None: for ever.
    """

    manifest_path: Path
    mode: str | None
    workload: Workload | None
    check: bool
    seconds: float | None
    pace_scale: float
    request_timeout_s: float = 120.0
    start_s: float | None = None
    off: str = ""


@dataclass
class RunResult:
    """Result of a run.

    Attributes:
        profile, policy: of the last accepted manifest.
        problem: why the run failed; empty if it did not.
        bad_input: True if the input is the cause.
    """

    points: list[Point] = field(default_factory=list)
    reconciles_per_point: int = 1
    records: list[Record] = field(default_factory=list)
    results: list[RequestResult] = field(default_factory=list)
    load: dict[str, Any] | None = None
    load_started: float | None = None
    profile: str = ""
    policy: Policy | None = None
    check: CheckResult | None = None
    started: float = 0.0
    ended: float = 0.0
    interrupted: bool = False
    problem: str = ""
    bad_input: bool = False


class Session:
    """One run of one resource.

    Args:
        router: a started router; the session closes it.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        options: RunOptions,
        state: StateDirectory,
        router: Router,
        display: Display,
    ) -> None:
        self._options = options
        self._display = display
        self._router = router
        self._state = state
        self._cluster = LocalCluster(
            manifest,
            state,
            on_event=self._event,
            on_backends=self._backends,
            on_refused=self._refused,
            notify=self._notify,
        )
        self._policy = policy_of(self._cluster.spec, options.pace_scale)
        self._recorder = Recorder(self._load_phase, self._point, self._record)
        self._metrics = ScrapeMetrics(lambda: self._cluster.targets, self._policy.pace.scrape)
        self._engines = EngineAdmin()
        fleet = Fleet(pace_scale=options.pace_scale)
        fleet.off = options.off
        self._reconciler = Reconciler(
            self._cluster,
            self._metrics,
            self._engines,
            pace_scale=options.pace_scale,
            telemetry=self._recorder,
            fleet=fleet,
        )
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()
        self._all_ready = asyncio.Event()
        self._signals = 0
        self._run: LoadRun | None = None
        self._cured_at: float | None = None
        self._ending_now: asyncio.Task[None] | None = None
        self.result = RunResult(profile=self._cluster.spec.profile, policy=self._policy, started=time.time())

    async def run(self) -> RunResult:
        """Run until the load, the check, the duration or a signal ends it, then stop all replicas."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        await self._metrics.start()
        self._display.open()
        self._notify(f"{self._cluster.key} at {self._router.url} (OpenAI API); starting its replicas")
        background = [
            asyncio.create_task(self._tick()),
            asyncio.create_task(
                watch(
                    self._options.manifest_path,
                    self._options.mode,
                    self._cluster.edit,
                    self._edited,
                    self._notify,
                )
            ),
            asyncio.create_task(watch_overrides(self._state.overrides, self._wake.set)),
        ]
        try:
            await self._until_done()
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await self._close()
            self._display.close()
        return self.result

    async def _until_done(self) -> None:
        """Send the load, if any; return when it ends, or the check, the duration or a signal ends the run."""
        stop = asyncio.create_task(self._stop.wait())
        waited: set[asyncio.Task[Any]] = {stop}
        load = None
        if self._options.workload is not None:
            load = asyncio.create_task(self._load(self._options.workload))
            waited.add(load)
        try:
            await asyncio.wait(waited, timeout=self._options.seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            if load is not None:
                if self._run is not None:
                    self._run.wind_down()
                    await asyncio.wait({load}, timeout=WIND_DOWN_S)
                    self._run.stop()
                    await asyncio.wait({load}, timeout=1)
                load.cancel()
                await asyncio.gather(load, return_exceptions=True)

    async def _load(self, workload: Workload) -> None:
        try:
            async with asyncio.timeout(self._options.start_s):
                await self._all_ready.wait()
        except TimeoutError:
            self.result.problem = f"not all replicas were ready within {self._options.start_s:g} s"
            return
        async with Client(self._router.url, timeout_s=self._options.request_timeout_s) as client:
            try:
                await client.find_model()
            except RequestError as error:
                self.result.problem = f"the load could not start: {error}"
                return
            length = f"{workload.seconds:.0f} s" if math.isfinite(workload.seconds) else "until stopped"
            self._notify(f"load: {workload.title}, {length}")
            self._run = LoadRun(client, workload)
            self.result.load_started = time.time()
            longest = min(workload.seconds, MAX_RUN_S) + LAST_ANSWERS_S
            late = asyncio.get_running_loop().call_later(longest, self._run.stop)
            try:
                await self._run.run()
            finally:
                late.cancel()
                self.result.results = self._run.tally.results
                self.result.load = self._run.summary()

    async def _tick(self) -> None:
        """Reconcile at the pace of the resource, and at once after an edit or a change of replicas."""
        while True:
            began = time.monotonic()
            try:
                await self._reconciler.run_once(self._cluster.key)
            except Exception as error:
                log.exception("reconcile_failed")
                self._notify(f"reconcile failed, retrying: {type(error).__name__}: {error}")
            self._wake.clear()
            wait_s = self._policy.pace.tick - (time.monotonic() - began)
            # wait_for of Python 3.11 loses a cancellation that arrives together with the event.
            try:
                async with asyncio.timeout(max(0.1, wait_s)):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _close(self) -> None:
        self._notify("draining and stopping all replicas")
        closing = asyncio.create_task(self._cluster.replica_set.close())
        await asyncio.gather(closing, return_exceptions=True)
        await self._metrics.close()
        await self._engines.close()
        await self._router.close()
        if self._ending_now is not None:
            await self._ending_now
        self.result.points = self._recorder.points
        self.result.reconciles_per_point = self._recorder.reconciles_per_point
        self.result.records = self._recorder.records
        self.result.ended = time.time()
        self.result.check = self._check()
        self._notify("all replicas have ended")

    def _check(self) -> CheckResult:
        return check_run(
            self._recorder.points,
            self._recorder.records,
            tuple(self._policy.objectives.latency),
            self._options.mode or self._policy.mode,
        )

    def _on_signal(self) -> None:
        """The first signal drains the replicas; the second ends them without their requests."""
        self._signals += 1
        self.result.interrupted = True
        self._stop.set()
        if self._signals == 2:
            self._notify("second signal: not waiting for requests")
            if self._run is not None:
                self._run.stop()
            self._ending_now = asyncio.get_running_loop().create_task(self._cluster.replica_set.end_now())

    def _point(self, point: Point) -> None:
        self._display.show(point, self._run.tally if self._run is not None else None)
        if not self._options.check:
            return
        if self._cured_at is None and self._check().cured:
            self._cured_at = time.monotonic()
            self._notify("every latency objective is met again")
        if self._cured_at is not None and time.monotonic() - self._cured_at > TAIL_S:
            self._stop.set()

    def _record(self, record: Record) -> None:
        if record.outcome in {"Started", "Recommended"} and record.diagnosis is not None:
            self._notify(f"diagnosis: {record.diagnosis.message}")

    def _event(self, kind: str, reason: str, message: str) -> None:
        if not self._all_ready.is_set():  # Events about replicas that are still starting are noise
            log.info("event", kind=kind, reason=reason, message=message)
            return
        self._notify(f"{'! ' if kind == 'Warning' else ''}{reason}: {message}")

    def _backends(self, backends: list[Backend]) -> None:
        self._router.use(backends)
        self._wake.set()
        if backends and len(backends) >= self._cluster.replica_set.desired:
            if not self._all_ready.is_set():
                self._notify(f"{counted(len(backends), 'replica')} ready")
            self._all_ready.set()

    def _refused(self, status: int, last_line: str) -> None:
        """End the run if a replica cannot start; after all were ready it is a crash and is retried."""
        if self._all_ready.is_set():
            return
        last_line = last_line.removeprefix("kvpilot-engine: error: ")
        self.result.bad_input = status == BAD_START
        ended = (
            f"an engine ended {MAX_FAILED_STARTS} times before it was ready, "
            f"the last time with status {status}: {last_line or 'no output'}"
        )
        self.result.problem = last_line if self.result.bad_input else ended
        self._stop.set()

    def _edited(self) -> None:
        self.result.profile = self._cluster.spec.profile
        self._policy = self.result.policy = policy_of(self._cluster.spec, self._options.pace_scale)
        self._metrics.scrape_every(self._policy.pace.scrape)
        self._wake.set()

    def _load_phase(self) -> str:
        return self._run.phase if self._run is not None else ""

    def _notify(self, line: str) -> None:
        log.info("notice", line=line)
        self._display.notify(line)


def print_steps(result: RunResult, notify: Callable[[str], None]) -> None:
    """Print the steps of the check, one line each."""
    if result.check is None:
        return
    for step in result.check.steps:
        when = f"{step.at - result.started:6.1f}s" if step.at is not None else "      -"
        notify(f"  {'ok  ' if step.seen else 'FAIL'} {when}  {step.name}: {step.message}")
