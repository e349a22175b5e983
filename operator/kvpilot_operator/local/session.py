"""``kvpilot up``: the parts of local mode wired together, from the first engine to the last one's end."""

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

from kvpilot_operator.adapters.engine_admin import EngineAdmin
from kvpilot_operator.adapters.scrape_metrics import ScrapeMetrics
from kvpilot_operator.load.client import Client, RequestError
from kvpilot_operator.load.results import Result
from kvpilot_operator.load.runner import LoadRun
from kvpilot_operator.load.workload import Workload
from kvpilot_operator.local.cluster import LocalCluster
from kvpilot_operator.local.display import Display
from kvpilot_operator.local.recorder import Point, Recorder
from kvpilot_operator.local.replicas import BAD_START, STARTS
from kvpilot_operator.local.router import Backend, Router
from kvpilot_operator.local.state import StateDirectory
from kvpilot_operator.local.verdict import Verdict, judge_run
from kvpilot_operator.local.watch import watch
from kvpilot_operator.loop import Loop
from kvpilot_operator.spec.resolve import policy_of
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.policy import Policy

log = structlog.get_logger(__name__)

TAIL_S = 12.0
"""How long a cured run goes on, so that the report shows what came after, s."""

LONGEST_RUN_S = 365 * 86400.0
"""A load without an end has ended by then, s."""

LAST_ANSWERS_S = 10.0
"""How long answers are waited for when the run is over before its load, s."""

ANSWERS_S = 30.0
"""How long answers are waited for after the last request was sent, s."""


@dataclass(frozen=True)
class RunOptions:
    """What a run does beyond keeping the engines up.

    Attributes:
        workload: sent through the router; the run ends with it. None runs until a signal.
        check: end as soon as the verdict is clear.
        seconds: end after this long in any case.
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


@dataclass
class Outcome:
    """What a run leaves.

    Attributes:
        profile, policy: of the manifest as it was last.
        problem: why the run could not do what it was asked for.
        bad_input: the problem is what was asked for.
    """

    points: list[Point] = field(default_factory=list)
    looks_per_point: int = 1
    records: list[Record] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    load: dict[str, Any] | None = None
    load_started: float | None = None
    profile: str = ""
    policy: Policy | None = None
    verdict: Verdict | None = None
    started: float = 0.0
    ended: float = 0.0
    interrupted: bool = False
    problem: str = ""
    bad_input: bool = False


class Session:
    """One run of one resource.

    Args:
        router: started, and closed in the end.
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
        self._cluster = LocalCluster(
            manifest,
            state,
            on_event=self._event,
            on_backends=self._backends,
            on_refused=self._refused,
            tell=self._tell,
        )
        self._policy = policy_of(self._cluster.spec, options.pace_scale)
        self._recorder = Recorder(self._load_phase, self._point, self._record)
        self._metrics = ScrapeMetrics(lambda: self._cluster.targets, self._policy.pace.scrape)
        self._engines = EngineAdmin()
        self._loop = Loop(
            self._cluster,
            self._metrics,
            self._engines,
            pace_scale=options.pace_scale,
            telemetry=self._recorder,
        )
        self._look = asyncio.Event()
        self._stop = asyncio.Event()
        self._all_ready = asyncio.Event()
        self._signals = 0
        self._run: LoadRun | None = None
        self._cured_at: float | None = None
        self._hurried: asyncio.Task[None] | None = None
        self.outcome = Outcome(profile=self._cluster.spec.profile, policy=self._policy, started=time.time())

    async def run(self) -> Outcome:
        """Everything, from the first engine to the last one's end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        await self._metrics.start()
        self._display.open()
        self._tell(f"{self._cluster.key} at {self._router.url} (OpenAI API); starting its engines")
        background = [
            asyncio.create_task(self._tick()),
            asyncio.create_task(
                watch(
                    self._options.manifest_path,
                    self._options.mode,
                    self._cluster.edit,
                    self._edited,
                    self._tell,
                )
            ),
        ]
        try:
            await self._until_done()
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await self._close()
            self._display.close()
        return self.outcome

    async def _until_done(self) -> None:
        """Send the load, if any; end with it, with the verdict, with the time, or with a signal."""
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
                    await asyncio.wait({load}, timeout=LAST_ANSWERS_S)
                    self._run.stop()
                    await asyncio.wait({load}, timeout=1)
                load.cancel()
                await asyncio.gather(load, return_exceptions=True)

    async def _load(self, workload: Workload) -> None:
        try:
            async with asyncio.timeout(self._options.start_s):
                await self._all_ready.wait()
        except TimeoutError:
            self.outcome.problem = f"not all engines were ready within {self._options.start_s:g} s"
            return
        async with Client(self._router.url, timeout_s=self._options.request_timeout_s) as client:
            try:
                await client.find_model()
            except RequestError as error:
                self.outcome.problem = f"the load could not start: {error}"
                return
            length = f"{workload.seconds:.0f} s" if math.isfinite(workload.seconds) else "until stopped"
            self._tell(f"load: {workload.title}, {length}")
            self._run = LoadRun(client, workload)
            self.outcome.load_started = time.time()
            longest = min(workload.seconds, LONGEST_RUN_S) + ANSWERS_S
            late = asyncio.get_running_loop().call_later(longest, self._run.stop)
            try:
                await self._run.run()
            finally:
                late.cancel()
                self.outcome.results = self._run.tally.results
                self.outcome.load = self._run.summary()

    async def _tick(self) -> None:
        """Look at the resource at its pace, and at once after an edit or a change of replicas."""
        while True:
            began = time.monotonic()
            try:
                await self._loop.run_once(self._cluster.key)
            except Exception as error:
                log.exception("look_failed")
                self._tell(f"a look failed, the next one goes on: {type(error).__name__}: {error}")
            self._look.clear()
            rest = self._policy.pace.tick - (time.monotonic() - began)
            # Not wait_for: that of Python 3.11 loses a cancellation that comes together with the event.
            try:
                async with asyncio.timeout(max(0.1, rest)):
                    await self._look.wait()
            except TimeoutError:
                continue

    async def _close(self) -> None:
        self._tell("draining and stopping all engines")
        closing = asyncio.create_task(self._cluster.replica_set.close())
        await asyncio.gather(closing, return_exceptions=True)
        await self._metrics.close()
        await self._engines.close()
        await self._router.close()
        if self._hurried is not None:
            await self._hurried
        self.outcome.points = self._recorder.points
        self.outcome.looks_per_point = self._recorder.looks_per_point
        self.outcome.records = self._recorder.records
        self.outcome.ended = time.time()
        self.outcome.verdict = self._verdict()
        self._tell("all engines have ended")

    def _verdict(self) -> Verdict:
        return judge_run(
            self._recorder.points,
            self._recorder.records,
            tuple(self._policy.objectives.latency),
            self._options.mode or self._policy.mode,
        )

    def _on_signal(self) -> None:
        """The first signal drains; a second one does not wait for requests."""
        self._signals += 1
        self.outcome.interrupted = True
        self._stop.set()
        if self._signals == 2:
            self._tell("told twice: not waiting for requests")
            if self._run is not None:
                self._run.stop()
            self._hurried = asyncio.get_running_loop().create_task(self._cluster.replica_set.hurry())

    def _point(self, point: Point) -> None:
        self._display.show(point, self._run.tally if self._run is not None else None)
        if not self._options.check:
            return
        if self._cured_at is None and self._verdict().cured:
            self._cured_at = time.monotonic()
            self._tell("every latency objective is met again")
        if self._cured_at is not None and time.monotonic() - self._cured_at > TAIL_S:
            self._stop.set()

    def _record(self, record: Record) -> None:
        if record.outcome in {"Started", "Recommended"} and record.diagnosis is not None:
            self._tell(f"diagnosis: {record.diagnosis.message}")

    def _event(self, kind: str, reason: str, message: str) -> None:
        if not self._all_ready.is_set():  # that engines which only start do not serve yet is no news
            log.info("event", kind=kind, reason=reason, message=message)
            return
        self._tell(f"{'! ' if kind == 'Warning' else ''}{reason}: {message}")

    def _backends(self, backends: list[Backend]) -> None:
        self._router.use(backends)
        self._look.set()
        if backends and len(backends) >= self._cluster.replica_set.wanted:
            if not self._all_ready.is_set():
                self._tell(f"{len(backends)} engines ready")
            self._all_ready.set()

    def _refused(self, status: int, words: str) -> None:
        """An engine cannot start at all. Once all have served, that is a crash like others: it is retried."""
        if self._all_ready.is_set():
            return
        words = words.removeprefix("kvpilot-engine: error: ")
        self.outcome.bad_input = status == BAD_START
        ended = (
            f"an engine ended {STARTS} times before it was ready, the last time with status {status}: "
            f"{words or 'it said nothing'}"
        )
        self.outcome.problem = words if self.outcome.bad_input else ended
        self._stop.set()

    def _edited(self) -> None:
        self.outcome.profile = self._cluster.spec.profile
        self._policy = self.outcome.policy = policy_of(self._cluster.spec, self._options.pace_scale)
        self._metrics.scrape_every(self._policy.pace.scrape)
        self._look.set()

    def _load_phase(self) -> str:
        return self._run.phase if self._run is not None else ""

    def _tell(self, line: str) -> None:
        log.info("told", line=line)
        self._display.tell(line)


def told_steps(outcome: Outcome, tell: Callable[[str], None]) -> None:
    """The verdict's steps, one line each."""
    if outcome.verdict is None:
        return
    for step in outcome.verdict.steps:
        when = f"{step.at - outcome.started:6.1f}s" if step.at is not None else "      -"
        tell(f"  {'ok  ' if step.seen else 'FAIL'} {when}  {step.name}: {step.message}")
