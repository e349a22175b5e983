"""Replicas as child processes: kept at the desired number, restarted after a crash, drained at the end."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import aiohttp

from kvpilot_engine.contract.wording import counted
from kvpilot_operator.adapters.metrics.scrape import Target
from kvpilot_operator.local.process import EXIT_GRACE_S, EngineProcess, Launch, is_ready
from kvpilot_operator.router.proxy import Backend
from kvpilot_operator.status.snapshot import Replica

PROBE_S = 2.0
"""Interval of the readiness probe of a ready replica, s."""

STARTING_PROBE_S = 0.2
"""Interval of the readiness probe of a replica that is not ready, s."""

FAILURES = 3
"""Consecutive failed probes after which a ready replica gets no new requests."""

MAX_BACKOFF_S = 30.0
STABLE_S = 60.0
"""Life of a process after which the back-off of its replica starts again at 1 s."""

MAX_FAILED_STARTS = 3
"""Processes of a replica that ended before it was ever ready, after which it counts as unable to start."""

BAD_START = 2
"""Exit status of an engine with an invalid configuration or model."""


@dataclass(eq=False)
class LocalReplica:
    """One replica, over all its processes; ``template`` is the digest of its settings."""

    name: str
    template: str
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    created_at: float = field(default_factory=time.time)
    ready: bool = False
    was_ready: bool = False  # at least once
    start_s: float = 0.0
    terminating: bool = False
    restarts: int = 0
    pending_reason: str = "Starting"
    url: str = ""
    admin_url: str = ""
    dismissed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class ReplicaSet:
    """Keeps the desired number of replicas of the desired template running.

    Args:
        launch: returns how to start the replica of a name.
        admin_token: bearer token of the admin API of every engine.
        on_change: called when the ready replicas change.
        on_refused: called with the exit status and last line of an engine with an invalid configuration, or
            of a replica that was never ready in ``MAX_FAILED_STARTS`` processes.
        notify: called with one line for the display.
    """

    def __init__(
        self,
        launch: Callable[[str], Launch],
        admin_token: str,
        on_change: Callable[[], None],
        on_refused: Callable[[int, str], None],
        notify: Callable[[str], None],
    ) -> None:
        self._launch = launch
        self._token = admin_token
        self._on_change = on_change
        self._on_refused = on_refused
        self._notify = notify
        self._replicas: list[LocalReplica] = []
        self._started = 0
        self._desired = 0
        self._first_to_go: set[str] = set()
        self._template = ""
        self._drain_s = 30.0
        self._session: aiohttp.ClientSession | None = None

    def converge_to(self, replicas: int, template: str, drain_s: float) -> None:
        """Set the desired number and template of the replicas; they change in the background.

        Args:
            template: digest; replicas of another template are replaced one at a time.
            drain_s: maximum time for a dismissed replica to finish its requests.
        """
        self._desired, self._template, self._drain_s = replicas, template, drain_s
        self._converge()

    def prefer_removal(self, uids: Iterable[str]) -> None:
        """Let these replicas go first when there are too many."""
        self._first_to_go = set(uids)

    def recycle(self, uid: str) -> None:
        """Dismiss one replica; another takes its place."""
        for replica in self._staying:
            if replica.uid == uid:
                self._dismiss(replica)
        self._converge()

    @property
    def desired(self) -> int:
        """Desired number of replicas."""
        return self._desired

    @property
    def rolling_out(self) -> bool:
        """True while replicas of an older template are being replaced."""
        return any(replica.template != self._template for replica in self._staying)

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """All replicas in the form of the ``Cluster`` port."""
        return tuple(
            Replica(
                uid=replica.uid,
                name=replica.name,
                ready=replica.ready,
                admin_url=replica.admin_url,
                admin_token=self._token,
                terminating=replica.terminating,
                pending_reason="" if replica.ready else replica.pending_reason,
                created_at=replica.created_at,
                start_s=replica.start_s,
                restarts=replica.restarts,
            )
            for replica in self._replicas
        )

    @property
    def targets(self) -> list[Target]:
        """Metrics pages of the replicas that have an address."""
        return [Target(replica.uid, f"{replica.url}/metrics") for replica in self._replicas if replica.url]

    @property
    def pages(self) -> dict[str, str]:
        """URL of each metrics page by the name of its replica."""
        return {replica.name: f"{replica.url}/metrics" for replica in self._replicas if replica.url}

    @property
    def backends(self) -> list[Backend]:
        """Replicas that may get new requests."""
        return [Backend(replica.name, replica.url) for replica in self._staying if replica.ready]

    async def close(self, drain_s: float | None = None) -> None:
        """Drain and end all replicas."""
        if drain_s is not None:
            self._drain_s = drain_s
        self._desired = 0
        self._converge()
        await asyncio.gather(
            *(replica.task for replica in self._replicas if replica.task), return_exceptions=True
        )
        if self._session is not None:
            await self._session.close()

    async def end_now(self) -> None:
        """End all replicas without waiting for their requests."""
        tasks = [replica.task for replica in self._replicas if replica.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _staying(self) -> list[LocalReplica]:
        return [replica for replica in self._replicas if not replica.terminating]

    def _converge(self) -> None:
        """Take the next step towards the desired state; each change of a replica calls this again."""
        staying = self._staying
        self._first_to_go &= {replica.uid for replica in staying}
        kept_longest = sorted(staying, key=lambda replica: replica.uid in self._first_to_go)
        for replica in kept_longest[self._desired :][::-1]:
            self._dismiss(replica)
        staying = self._staying
        # Dismiss one outdated replica when all others are ready: at most one is missing at a time.
        outdated = [replica for replica in staying if replica.template != self._template]
        if (
            outdated
            and len(staying) == self._desired
            and all(replica.ready or replica in outdated for replica in staying)
        ):
            self._dismiss(next((replica for replica in outdated if not replica.ready), outdated[0]))
        for _ in range(self._desired - len(self._staying)):
            self._started += 1
            replica = LocalReplica(f"engine-{self._started}", self._template)
            self._replicas.append(replica)
            replica.task = asyncio.create_task(self._keep_running(replica))
        self._on_change()

    def _dismiss(self, replica: LocalReplica) -> None:
        replica.terminating = True
        replica.ready = False
        replica.dismissed.set()

    async def _keep_running(self, replica: LocalReplica) -> None:
        """Run processes of a replica until it is dismissed."""
        backoff = 1.0
        try:
            while not replica.dismissed.is_set():
                began = time.monotonic()
                status, last_line = await self._run(replica)
                if replica.dismissed.is_set():
                    return
                backoff = 1.0 if time.monotonic() - began > STABLE_S else min(2 * backoff, MAX_BACKOFF_S)
                replica.restarts += 1
                replica.pending_reason = f"CrashLoopBackOff: exit status {status}: {last_line}"
                if status == BAD_START or (not replica.was_ready and replica.restarts >= MAX_FAILED_STARTS):
                    self._on_refused(status, last_line)
                self._notify(
                    f"{replica.name} ended with status {status} ({last_line}); restart in {backoff:g} s"
                )
                await self._wait_unless_dismissed(replica, backoff)
        finally:
            self._replicas.remove(replica)
            self._converge()

    async def _run(self, replica: LocalReplica) -> tuple[int, str]:
        """Run one process of a replica; its exit status and last line."""
        process = await EngineProcess.start(self._launch(replica.name))
        ended = asyncio.create_task(process.wait())
        serving = asyncio.create_task(self._serve(replica, process))
        dismissed = asyncio.create_task(replica.dismissed.wait())
        try:
            await asyncio.wait({ended, dismissed}, return_when=asyncio.FIRST_COMPLETED)
            serving.cancel()
            self._unready(replica)
            if not ended.done():
                await process.end(self._drain_s + EXIT_GRACE_S)
            return await ended, process.last_line
        except asyncio.CancelledError:
            await process.end_now()
            raise
        finally:
            for task in (serving, dismissed, ended):
                task.cancel()
            replica.url = replica.admin_url = ""
            self._unready(replica)

    def _unready(self, replica: LocalReplica) -> None:
        if replica.ready:
            replica.ready = False
        self._on_change()

    async def _serve(self, replica: LocalReplica, process: EngineProcess) -> None:
        """Read the ports, then probe readiness until the process ends."""
        ports = await process.ports()
        if ports is None:
            return
        replica.url, replica.admin_url = (f"http://127.0.0.1:{port}" for port in ports)
        if self._session is None:
            self._session = aiohttp.ClientSession()
        failures = 0
        while True:
            if await is_ready(self._session, replica.url):
                failures = 0
                if not replica.ready and not replica.terminating:
                    if not replica.was_ready:
                        replica.start_s = time.time() - replica.created_at
                    replica.ready = replica.was_ready = True
                    self._converge()
            else:
                failures += 1
                if replica.ready and failures >= FAILURES:
                    replica.pending_reason = "Unready"
                    self._notify(f"{replica.name} is not ready: its probe failed {counted(failures, 'time')}")
                    self._unready(replica)
            await asyncio.sleep(PROBE_S if replica.ready else STARTING_PROBE_S)

    @staticmethod
    async def _wait_unless_dismissed(replica: LocalReplica, seconds: float) -> None:
        try:
            await asyncio.wait_for(replica.dismissed.wait(), seconds)
        except TimeoutError:
            return
