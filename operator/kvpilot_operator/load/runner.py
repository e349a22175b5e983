"""Sends the requests of a workload on schedule."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from kvpilot_operator.load.client import Client, RequestError
from kvpilot_operator.load.results import RequestResult, Tally
from kvpilot_operator.load.workload import Arrival, Workload


class LoadRun:
    """One open-loop run of a workload: each request is sent when due, however many are in flight.

    Args:
        on_result: called with the result of each request.
    """

    def __init__(
        self, client: Client, workload: Workload, on_result: Callable[[RequestResult], None] | None = None
    ) -> None:
        self.tally = Tally()
        self.phase = ""
        self._client = client
        self._workload = workload
        self._on_result = on_result
        self._tasks: set[asyncio.Task[None]] = set()
        self._winding_down = asyncio.Event()  # send no more requests
        self._stopping = asyncio.Event()  # and do not wait for answers
        self._started = 0.0
        self._offered_s: float | None = None
        self._ended: float | None = None

    @property
    def seconds(self) -> float:
        """Time from the start until now, or until the last answer, s."""
        if not self._started:
            return 0.0
        return (self._ended or time.monotonic()) - self._started

    @property
    def offered_seconds(self) -> float:
        """Time in which requests were due, s: the length of the workload, or less if the run was stopped."""
        return self.seconds if self._offered_s is None else self._offered_s

    async def run(self) -> None:
        """Send all requests when they are due, then wait for the answers."""
        await self._probe()
        self._started = time.monotonic()
        try:
            for arrival in self._workload.arrivals(self.tally):
                if await self._stopped_before(self._started + arrival.at):
                    break
                self._send(arrival)
            # A complete schedule lasts longer than until its last request.
            self._offered_s = self.seconds if self._winding_down.is_set() else self._workload.seconds
            await self._drain()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._ended = time.monotonic()

    async def _probe(self) -> None:
        """Send the probes of the workload one by one and record their latencies."""
        for request in self._workload.probes:
            self.phase = "probe"
            if self._winding_down.is_set():
                return
            began = time.monotonic()
            try:
                await self._client.send(request)
            except RequestError:
                continue  # the load itself reports the error
            self.tally.probed.append(time.monotonic() - began)

    def wind_down(self) -> None:
        """Send no more requests; wait for those in flight."""
        self._winding_down.set()

    def stop(self) -> None:
        """Send no more requests; cancel those in flight, which count as cancelled."""
        self._winding_down.set()
        self._stopping.set()

    def summary(self) -> dict[str, object]:
        """Summary of the results so far."""
        return self.tally.summary(self.offered_seconds)

    async def _stopped_before(self, due: float) -> bool:
        """Wait until ``due``; True if the run was stopped meanwhile."""
        wait = due - time.monotonic()
        if wait > 0:
            try:
                await asyncio.wait_for(self._winding_down.wait(), wait)
            except TimeoutError:
                return False
        return self._winding_down.is_set()

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
        kind, message = "cancelled", "cancelled"
        try:
            answer = await self._client.send(arrival.request())
        except RequestError as error:
            kind, message = error.kind, str(error)
        except Exception as error:  # an unforeseen error fails this request, not the run
            kind, message = "protocol", f"{type(error).__name__}: {error}"
        else:
            kind = "ok"
            arrival.answered(answer.text)
        finally:  # also after a cancellation: each offered request has a result
            seconds = time.monotonic() - due
            if kind == "ok":
                first = None if answer.first_token_at is None else answer.first_token_at - due
                result = RequestResult(
                    arrival.phase, arrival.at, late, seconds, kind, "", first,
                    answer.prompt_tokens, answer.cached_tokens, answer.output_tokens,
                )  # fmt: skip
            else:
                result = RequestResult(arrival.phase, arrival.at, late, seconds, kind, message)
            self.tally.results.append(result)
            if self._on_result is not None:
                self._on_result(result)
