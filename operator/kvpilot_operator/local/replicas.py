"""The replicas of a resource: as many engines as asked for, restarted after a crash, drained when they go."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

from kvpilot_operator.adapters.scrape_metrics import Target
from kvpilot_operator.local.process import LATE_S, EngineProcess, Launch, is_ready
from kvpilot_operator.local.router import Backend
from kvpilot_operator.ports import Replica

PROBE_S = 2.0
"""Between two looks at a ready engine, s."""

STARTING_PROBE_S = 0.2
FAILURES = 3
"""Failed looks after which a ready engine gets no new requests."""

LONGEST_BACKOFF_S = 30.0
STABLE_S = 60.0
"""An engine that lived this long starts its back-off anew."""

STARTS = 3
"""Starts of an engine that all ended before it was ready: it is not expected to come any more."""

BAD_START = 2
"""Exit status of an engine that cannot use its configuration or model."""


@dataclass(eq=False)
class Pod:
    """One replica over the life of all its processes."""

    name: str
    template: str
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    created_at: float = field(default_factory=time.time)
    ready: bool = False
    served: bool = False  # was ready at some time
    terminating: bool = False
    restarts: int = 0
    pending_reason: str = "Starting"
    url: str = ""
    admin_url: str = ""
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class ReplicaSet:
    """Keeps the number and the template of the running engines what was asked for.

    Args:
        launch: how to start the pod of that name now.
        admin_token: opens every engine's admin API.
        on_change: called when the ready replicas change.
        on_refused: told the exit status and last words of an engine that refuses what it was started with,
            or that ended ``STARTS`` times and was never ready.
        tell: one line for people.
    """

    def __init__(
        self,
        launch: Callable[[str], Launch],
        admin_token: str,
        on_change: Callable[[], None],
        on_refused: Callable[[int, str], None],
        tell: Callable[[str], None],
    ) -> None:
        self._launch = launch
        self._token = admin_token
        self._on_change = on_change
        self._on_refused = on_refused
        self._tell = tell
        self._pods: list[Pod] = []
        self._started = 0
        self._wanted = 0
        self._template = ""
        self._drain_s = 30.0
        self._session: aiohttp.ClientSession | None = None

    def ask(self, replicas: int, template: str, drain_s: float) -> None:
        """Have that many engines of this template; takes effect in the background.

        Args:
            template: a digest; engines of another one are replaced, one at a time.
            drain_s: longest time that a leaving engine finishes its requests.
        """
        self._wanted, self._template, self._drain_s = replicas, template, drain_s
        self._converge()

    @property
    def wanted(self) -> int:
        """How many were asked for."""
        return self._wanted

    @property
    def rolling_out(self) -> bool:
        """Whether engines of an older template are still being replaced."""
        return any(pod.template != self._template for pod in self._staying)

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """All of them as the loop sees them."""
        return tuple(
            Replica(
                uid=pod.uid,
                name=pod.name,
                ready=pod.ready,
                admin_url=pod.admin_url,
                admin_token=self._token,
                terminating=pod.terminating,
                pending_reason="" if pod.ready else pod.pending_reason,
                created_at=pod.created_at,
                restarts=pod.restarts,
            )
            for pod in self._pods
        )

    @property
    def targets(self) -> list[Target]:
        """Metrics pages of the engines that have an address."""
        return [Target(pod.uid, f"{pod.url}/metrics") for pod in self._pods if pod.url]

    @property
    def backends(self) -> list[Backend]:
        """Where new requests may go."""
        return [Backend(pod.name, pod.url) for pod in self._staying if pod.ready]

    async def close(self, drain_s: float | None = None) -> None:
        """Drain and end all engines."""
        if drain_s is not None:
            self._drain_s = drain_s
        self._wanted = 0
        self._converge()
        await asyncio.gather(*(pod.task for pod in self._pods if pod.task), return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def hurry(self) -> None:
        """End all engines at once."""
        tasks = [pod.task for pod in self._pods if pod.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _staying(self) -> list[Pod]:
        return [pod for pod in self._pods if not pod.terminating]

    def _converge(self) -> None:
        """Take the next step towards what was asked for; each change of a pod calls this again."""
        staying = self._staying
        for pod in staying[self._wanted :][::-1]:
            self._dismiss(pod)
        staying = self._staying
        # One old engine leaves when all others serve: at most one replica is missing at a time.
        old = [pod for pod in staying if pod.template != self._template]
        if old and len(staying) == self._wanted and all(pod.ready or pod in old for pod in staying):
            self._dismiss(next((pod for pod in old if not pod.ready), old[0]))
        for _ in range(self._wanted - len(self._staying)):
            self._started += 1
            pod = Pod(f"engine-{self._started}", self._template)
            self._pods.append(pod)
            pod.task = asyncio.create_task(self._live(pod))
        self._on_change()

    def _dismiss(self, pod: Pod) -> None:
        pod.terminating = True
        pod.ready = False
        pod.leave.set()

    async def _live(self, pod: Pod) -> None:
        """A pod from its first process to the end of its last one."""
        backoff = 1.0
        try:
            while not pod.leave.is_set():
                began = time.monotonic()
                status, words = await self._run(pod)
                if pod.leave.is_set():
                    return
                backoff = 1.0 if time.monotonic() - began > STABLE_S else min(2 * backoff, LONGEST_BACKOFF_S)
                pod.restarts += 1
                pod.pending_reason = f"CrashLoopBackOff: exit status {status}: {words}"
                if status == BAD_START or (not pod.served and pod.restarts >= STARTS):
                    self._on_refused(status, words)
                self._tell(f"{pod.name} ended with status {status} ({words}); again in {backoff:g} s")
                await self._unless_leaving(pod, backoff)
        finally:
            self._pods.remove(pod)
            self._converge()

    async def _run(self, pod: Pod) -> tuple[int, str]:
        """One process of a pod; its exit status and last words."""
        process = await EngineProcess.start(self._launch(pod.name))
        ended = asyncio.create_task(process.wait())
        serving = asyncio.create_task(self._serve(pod, process))
        leaving = asyncio.create_task(pod.leave.wait())
        try:
            await asyncio.wait({ended, leaving}, return_when=asyncio.FIRST_COMPLETED)
            serving.cancel()
            self._unready(pod)
            if not ended.done():
                await process.end(self._drain_s + LATE_S)
            return await ended, process.last_line
        except asyncio.CancelledError:
            await process.hurry()
            raise
        finally:
            for task in (serving, leaving, ended):
                task.cancel()
            pod.url = pod.admin_url = ""
            self._unready(pod)

    def _unready(self, pod: Pod) -> None:
        if pod.ready:
            pod.ready = False
        self._on_change()

    async def _serve(self, pod: Pod, process: EngineProcess) -> None:
        """Learn the ports, then watch readiness for as long as the process lives."""
        ports = await process.ports()
        if ports is None:
            return
        pod.url, pod.admin_url = (f"http://127.0.0.1:{port}" for port in ports)
        if self._session is None:
            self._session = aiohttp.ClientSession()
        failures = 0
        while True:
            if await is_ready(self._session, pod.url):
                failures = 0
                if not pod.ready and not pod.terminating:
                    pod.ready = pod.served = True
                    self._converge()
            else:
                failures += 1
                if pod.ready and failures >= FAILURES:
                    pod.pending_reason = "Unready"
                    self._tell(f"{pod.name} is not ready any more: its probe failed {failures} times")
                    self._unready(pod)
            await asyncio.sleep(PROBE_S if pod.ready else STARTING_PROBE_S)

    @staticmethod
    async def _unless_leaving(pod: Pod, seconds: float) -> None:
        try:
            await asyncio.wait_for(pod.leave.wait(), seconds)
        except TimeoutError:
            return
