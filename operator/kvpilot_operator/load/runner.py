"""Sends a workload on its own schedule, whatever the server does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from kvpilot_operator.load.client import Client, RequestError
from kvpilot_operator.load.results import Result, Tally
from kvpilot_operator.load.workload import Arrival, Workload


class LoadRun:
    """One run of a workload. Open loop: a request is sent when it is due, however many are still in flight.

    Args:
        on_result: told of every request that ended.
    """

    def __init__(
        self, client: Client, workload: Workload, on_result: Callable[[Result], None] | None = None
    ) -> None:
        self.tally = Tally()
        self.phase = ""
        self._client = client
        self._workload = workload
        self._on_result = on_result
        self._tasks: set[asyncio.Task[None]] = set()
        self._last = asyncio.Event()  # nothing more is sent
        self._stopping = asyncio.Event()  # nor waited for
        self._started = 0.0
        self._offered_s: float | None = None
        self._ended: float | None = None

    @property
    def seconds(self) -> float:
        """From the start until now, or until the last answer, s."""
        if not self._started:
            return 0.0
        return (self._ended or time.monotonic()) - self._started

    @property
    def offered_seconds(self) -> float:
        """Over which requests were due, s: the workload's length, or less when the run was stopped before."""
        return self.seconds if self._offered_s is None else self._offered_s

    async def run(self) -> None:
        """Send everything that is due, then wait for the answers."""
        await self._probe()
        self._started = time.monotonic()
        try:
            for arrival in self._workload.arrivals(self.tally):
                if await self._stopped_before(self._started + arrival.at):
                    break
                self._send(arrival)
            # A schedule that was sent to its end goes on after its last request.
            self._offered_s = self.seconds if self._last.is_set() else self._workload.seconds
            await self._drain()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._ended = time.monotonic()

    async def _probe(self) -> None:
        """Send the workload's probes one after another."""
        for ask in self._workload.probes:
            self.phase = "probe"
            if self._last.is_set():
                return
            began = time.monotonic()
            try:
                await self._client.send(ask)
            except RequestError:
                continue  # what is wrong shows in the load itself
            self.tally.probed.append(time.monotonic() - began)

    def wind_down(self) -> None:
        """Send nothing more; what is in flight is still waited for."""
        self._last.set()

    def stop(self) -> None:
        """Send nothing more; what is in flight is cut off and counted as cancelled."""
        self._last.set()
        self._stopping.set()

    def summary(self) -> dict[str, object]:
        """Figures so far."""
        return self.tally.summary(self.offered_seconds)

    async def _stopped_before(self, due: float) -> bool:
        """Wait until ``due``; True when the run was stopped meanwhile."""
        wait = due - time.monotonic()
        if wait > 0:
            try:
                await asyncio.wait_for(self._last.wait(), wait)
            except TimeoutError:
                return False
        return self._last.is_set()

    async def _drain(self) -> None:
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            while self._tasks and not stopping.done():
                await asyncio.wait({*self._tasks, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()

    def _send(self, arrival: Arrival) -> None:
        self.phase = arrival.phase
        self.tally.offered += 1
        task = asyncio.create_task(self._one(arrival))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _one(self, arrival: Arrival) -> None:
        due = self._started + arrival.at
        late = max(0.0, time.monotonic() - due)
        kind, message = "cancelled", "cut off"
        try:
            answer = await self._client.send(arrival.ask())
        except RequestError as error:
            kind, message = error.kind, str(error)
        except Exception as error:  # what the client does not foresee is no cut-off, and no end of the run
            kind, message = "protocol", f"{type(error).__name__}: {error}"
        else:
            kind = "ok"
            arrival.answered(answer.text)
        finally:  # a cut-off request has a result too: nothing offered is ever missing from the figures
            seconds = time.monotonic() - due
            if kind == "ok":
                first = None if answer.first_token_at is None else answer.first_token_at - due
                result = Result(
                    arrival.phase, arrival.at, late, seconds, kind, "", first,
                    answer.prompt_tokens, answer.cached_tokens, answer.output_tokens,
                )  # fmt: skip
            else:
                result = Result(arrival.phase, arrival.at, late, seconds, kind, message)
            self.tally.results.append(result)
            if self._on_result is not None:
                self._on_result(result)
