"""A simulated engine: continuous batching as a fluid of steps between events.

A request waits for a worker slot (admission), then for a row (batch wait), then its prompt is computed in
chunks of the step's token budget (prefill), then one token per step (decode). Every row in a step advances by
one step, so progress is counted in steps ``v``, and a request costs a few events instead of one per token:

    step time = slow x (t(rows) + tax + context seconds of its rows + prefill seconds of this step's chunk)

A row attends to as many tokens in each of its steps as in the mean of them, and what its prompt attends to is
spread over all of them.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from math import ceil
from typing import Any

from kvpilot_engine.contract import AdminConfig, ApplyReport, ConfigPatch, KVCacheConfig
from kvpilot_engine.contract.config import QUIET
from kvpilot_engine.contract.knobs import MIB
from kvpilot_engine.contract.metrics import EDGES_S, ROW_BUCKETS
from kvpilot_engine.contract.step_curve import completed, marginal_gain
from kvpilot_operator.backtest.counters import (
    ADMISSION,
    ARRIVALS,
    BATCH,
    CEILING,
    COUNTERS,
    DECODE,
    DECODING,
    ERROR,
    EVICTED,
    FIRST,
    HIT,
    OK,
    OUT,
    PREFILL,
    QUERY,
    ROWS,
    SECONDS,
    SHED,
    STEPS,
    TIER_LOAD,
    TIMEOUT,
    USED,
    WASTED,
    WITHIN,
    Scrapes,
)
from kvpilot_operator.backtest.model import EngineModel, SimulatedRequest
from kvpilot_operator.tuning.configuration import KNOBS, value
from kvpilot_operator.tuning.observation import Gauges, MemoryUse, Promoted, Sample

MEMORY_LIMIT_BYTES = 1000 * MIB

FRESH_BUSY_S = 30.0
"""A bucket of the curve counts as measured until this much busy time after its last step."""

MIX_WEIGHT = 0.005
"""Weight of one step in the mean rows and the mean prefill time of the engine's meter."""

MIN_CHUNK = 16
"""Prompt tokens that a step computes at least, however many rows decode."""

_EDGES = (*EDGES_S, sys.float_info.max)
"""Those of the histograms; only a request that failed takes longer than the last one."""

_BUCKET_OF = [bisect_left(ROW_BUCKETS, min(rows, ROW_BUCKETS[-1])) for rows in range(1025)]

Ended = tuple[float, float, float]
"""Arrival (s since the epoch), whole latency and time to the first token (s; infinite when it failed)."""


class SimulatedEngine:
    """One replica. Its counters only grow; windows are differences between two scrapes.

    Args:
        asked_at: when its pod was created, s since the epoch.
        ready_at: when it starts to serve; infinite for a pod that cannot be scheduled.
        scrape: interval of its scrapes, s.
        coin: uniform in [0, 1), for faults that hit some requests.

    Attributes:
        slow: factor on its step time; ``outlier`` is a fixed part of it.
        hung: True while no step ends; ``stale``: while it is not scraped; ``silent``: while it has no series;
            ``refuses``: while it takes no configuration.
        ended: requests that ended since somebody last took them.
    """

    __slots__ = (  # an event reads a dozen of them, and slots are read faster
        "_attend_s", "_attended", "_attended_before", "_attending", "_batch", "_clock", "_coin", "_cold",
        "_config", "_context", "_context_s", "_described", "_done", "_errors", "_flushed", "_free",
        "_idle_slots", "_loading", "_mean_context", "_mean_prefill_s", "_mean_rows", "_order", "_prefetched",
        "_prefill_s", "_prefilling", "_queue", "_rowless", "_rows", "_seen", "_served", "_share",
        "_step_tokens", "_table", "_timeout", "_v", "_workers", "asked_at", "counters", "ended", "epoch",
        "generation", "hung", "model", "name", "outlier", "ready_at", "refuses", "restarts", "scrapes",
        "silent", "slow", "stale", "uid", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        uid: str,
        name: str,
        promoted: Promoted,
        model: EngineModel,
        ready_at: float,
        *,
        asked_at: float | None = None,
        scrape: float = 1.0,
        coin: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.uid, self.name, self.model = uid, name, model
        self.ready_at, self.asked_at = ready_at, ready_at if asked_at is None else asked_at
        self.restarts = 0
        self.slow = self.outlier = 1.0
        self.hung = self.stale = self.silent = self.refuses = False
        self.ended: list[Ended] = []
        self.counters = [0.0] * COUNTERS
        self.scrapes = Scrapes(ready_at, scrape)
        self._coin = coin
        self._clock = ready_at
        self._served = 0.0
        self._start(promoted)

    def _start(self, promoted: Promoted) -> None:
        self.waiting: deque[SimulatedRequest] = deque()
        self._rowless: deque[SimulatedRequest] = deque()
        self._prefilling: deque[tuple[float, SimulatedRequest]] = deque()
        self._rows: list[tuple[float, int, SimulatedRequest]] = []  # heap; a prompt has its row as well
        self._done: list[SimulatedRequest] = []
        self._cold = self.model.warm_requests > self._served
        self._order = 0
        self._v = self._free = 0.0
        self._context = self._mean_context = 0.0  # tokens that all rows attend to in a step, and one of them
        self._attending = 0.0  # time in a step for what the prompts of its rows attend to, s
        self._attended = self._attended_before = 0.0  # all of it so far, and at the last metering
        self._mean_rows, self._mean_prefill_s = 1.0, 0.0
        self._seen: dict[int, float] = {}  # busy seconds at the last scrape that showed steps of a bucket
        self._flushed = list(self.counters)
        self.generation, self.epoch = promoted.generation, 0
        self._configure(promoted.config)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration in force, camelCase."""
        return self._config

    @config.setter
    def config(self, config: Mapping[str, Any]) -> None:
        self.meter()
        self._configure(config)
        self._fill(self._clock, self._v)

    def _configure(self, config: Mapping[str, Any]) -> None:
        model, fault = self.model, self.model.fault
        self._config = dict(config)
        self._described: AdminConfig | None = None
        bites, used = fault.bites(self._config), fault.used(self._config)
        self._workers, self._batch = int(value(used, "numWorkers")), int(value(used, "batchSize"))
        self._idle_slots = int(value(config, "numWorkers")) - self._workers  # of an inert change
        self._step_tokens = int(value(used, "maxStepTokens"))
        self._queue = int(value(config, "maxQueue") if model.queue is None else model.queue)
        self._timeout = float(value(config, "requestTimeoutS") if model.timeout is None else model.timeout)
        self._errors = fault.errors if bites else 0.0
        slower = fault.slower if bites else 1.0
        tax = model.tax(self.config)
        most = max(self._batch, len(self._rows))  # a lowered batch drains
        self._table = [0.0, *(slower * (model.step_s(rows) + tax) for rows in range(1, most + 1))]
        self._prefill_s, self._context_s = slower * model.prefill_s, slower * model.context_s
        self._attend_s = slower * model.attend_s
        self._share = min(1.0, model.hits(self.config) / model.ceiling) if model.ceiling else 0.0
        self._loading = model.tier_s(self.config)
        self._prefetched = model.prefetched(self.config)

    def restart(self, promoted: Promoted) -> None:
        """Start again from the ConfigMap; requests in flight fail, and what no scrape saw is lost."""
        self.close()
        self.counters = list(self.scrapes.last)
        self.restarts += 1
        self._served = 0.0
        self._start(promoted)

    def close(self) -> None:
        """The process ends: requests in flight fail."""
        self.meter()
        for request in self.in_flight():
            self.ended.append((request.at, math.inf, math.inf))

    def warm(self) -> None:
        """Its cache is as full as that of an old replica."""
        self._served, self._cold = float(self.model.warm_requests), False

    def in_flight(self) -> list[SimulatedRequest]:
        """Requests that came and did not end."""
        return [*self.waiting, *self._rowless, *(request for _, _, request in self._rows)]

    @property
    def held(self) -> int:
        """Requests that hold a worker slot."""
        return len(self._rows) + len(self._rowless)

    @property
    def inside(self) -> int:
        """Requests that came and did not end."""
        return self.held + len(self.waiting)

    @property
    def unschedulable(self) -> bool:
        """True if its pod never starts."""
        return math.isinf(self.ready_at)

    # Events

    def run(  # noqa: PLR0912, PLR0915 - one more call per event would cost a third of the speed
        self, until: float, arrivals: Sequence[SimulatedRequest] = ()
    ) -> None:
        """Take requests in order of their arrival, and work, until a time (s since the epoch)."""
        working, prefilling, done = self._rows, self._prefilling, self._done
        waiting, rowless = self.waiting, self._rowless
        most, step_tokens, hung = min(self._workers, self._batch), self._step_tokens, self.hung
        slow = self.slow * self.outlier
        table = [slow * step_s for step_s in self._table]
        prefill_s, context_s = slow * self._prefill_s, slow * self._context_s
        spent_with, steps_with = [0.0] * len(table), [0.0] * len(table)  # by rows
        clock, v = self._clock, self._v
        for arrival in (*arrivals, None):
            stop = until if arrival is None else arrival.at
            while working and not hung:  # until the first row ends, or the next request comes
                rows, target, free = len(working), working[0][0], self._free
                step, steps = table[rows], target - v
                if context_s:
                    step += context_s * self._context
                if self._attending:
                    step += slow * self._attending
                spent = steps * step
                chunks = chunk_s = 0.0
                if free > v:
                    chunks = (free if free < target else target) - v
                    room = step_tokens - rows + len(prefilling)
                    chunk_s = prefill_s * (room if room > MIN_CHUNK else MIN_CHUNK)
                    spent += chunks * chunk_s
                reached = clock + spent <= stop
                if not reached:
                    spent = stop - clock if stop > clock else 0.0
                    steps = spent / (step + chunk_s)
                    if steps > chunks:  # the steps behind the prompts are shorter
                        steps = chunks + (spent - chunks * (step + chunk_s)) / step
                    target = v + steps
                while prefilling and prefilling[0][0] <= target:  # a prompt is computed on the way
                    at, request = prefilling.popleft()
                    first = clock + (at - v) * step
                    if free > v < at:
                        first += ((free if free < at else at) - v) * chunk_s
                    request.first = first
                clock += spent
                v = target
                spent_with[rows] += spent
                steps_with[rows] += steps
                if not reached:
                    break
                request = heappop(working)[2]
                if context_s:
                    self._context -= request.context
                if request.attending:
                    self._attending -= request.attending
                request.ended = clock
                done.append(request)
                if waiting or rowless:
                    self._fill(clock, v)
            else:
                clock = max(clock, stop)
            if arrival is None:
                break
            if len(working) < most:  # nobody waits while a row and a slot are free
                arrival.admitted = clock
                self._prefill(arrival, clock, v)
            else:
                self._queue_up(arrival, clock, v)
        count = self.counters
        for rows, steps in enumerate(steps_with):
            if steps:
                bucket = _BUCKET_OF[rows]
                count[SECONDS + bucket] += spent_with[rows]
                count[ROWS + bucket] += steps * rows
                count[STEPS] += steps
        count[ARRIVALS] += len(arrivals)
        self._clock, self._v = clock, v

    def _queue_up(self, request: SimulatedRequest, clock: float, v: float) -> None:
        """A request finds no slot or no row; it is shed if the queue is full."""
        if len(self.waiting) >= self._queue:
            self.counters[SHED] += 1.0
            self.ended.append((request.at, math.inf, math.inf))
            return
        self.waiting.append(request)
        if self.held < self._workers:
            self._fill(clock, v)

    def _fill(self, clock: float, v: float) -> None:
        """Admit while slots are free, then give rows."""
        waiting, rowless, rows = self.waiting, self._rowless, len(self._rows)
        while waiting and rows + len(rowless) < self._workers:
            request = waiting.popleft()
            if clock - request.at > self._timeout:
                self._lose(request, clock)
                continue
            request.admitted = clock
            rowless.append(request)
        while rowless and rows < self._batch:
            self._prefill(rowless.popleft(), clock, v)
            rows += 1

    def _prefill(self, request: SimulatedRequest, clock: float, v: float) -> None:
        """Put a prompt behind those that are being computed; it begins with the next step."""
        count, rows, prefilling = self.counters, self._rows, self._prefilling
        prompt, cached, out = request.prompt, request.cached, request.out
        hit = cached * self._share
        if self._cold:
            served = self._served + len(self._done)
            self._cold = served < self.model.warm_requests
            hit *= min(1.0, served / self.model.warm_requests)
        request.rowed = clock
        left = prompt - hit
        count[QUERY] += prompt
        count[HIT] += hit
        count[CEILING] += cached
        room = self._step_tokens - len(rows) + len(prefilling)
        chunks = left / (room if room > MIN_CHUNK else MIN_CHUNK)
        free, next_step = self._free, v + 1.0
        self._free = free = (free if free > v else v) + chunks
        first = float(ceil((free if free > next_step else next_step) - 1e-6))
        prefilling.append((first, request))
        self._order = order = self._order + 1
        ends = first + out - 1.0  # as many steps follow as the answer has further tokens
        if self._context_s:
            decoded = (prompt + 0.5 * out) * (out - 1.0)
            request.context = (decoded + hit) / (ends - v)  # its prompt reads what is cached once
            self._context += request.context
        if self._attend_s:
            attended = self._attend_s * left * (hit + 0.5 * left)
            request.attending = attended / (ends - v)
            self._attending += request.attending
            self._attended += attended
        heappush(rows, (ends, order, request))

    def _lose(self, request: SimulatedRequest, clock: float) -> None:
        self.counters[TIMEOUT] += 1.0
        self.ended.append((request.at, math.inf, math.inf))

    # What it publishes

    def scrape(self, now: float) -> None:
        """The metrics source reads the counters; requests that waited too long are given up."""
        while self.waiting and now - self.waiting[0].at > self._timeout:
            self._lose(self.waiting.popleft(), now)
        self.meter()
        if not self.stale:
            self.scrapes.add(now, self.counters)

    def meter(self) -> None:
        """Bring the counters up to date that grow with requests that ended, and the means of the meter."""
        count, before = self.counters, self._flushed
        if self._done:
            self._count_done()
        if (steps := count[STEPS] - before[STEPS]) > 0:
            busy = sum(count[SECONDS:ROWS])
            rows = sum(count[ROWS:]) - sum(before[ROWS:])
            weight = 1.0 - (1.0 - MIX_WEIGHT) ** steps
            self._mean_rows += weight * (max(1.0, rows / steps) - self._mean_rows)
            computed = count[QUERY] - before[QUERY] - (count[HIT] - before[HIT])
            prefill_s = computed * self._prefill_s + self._attended - self._attended_before
            prefill_s *= self.slow * self.outlier
            self._mean_prefill_s += weight * (prefill_s / steps - self._mean_prefill_s)
            if self._rows:
                self._mean_context = self._context / len(self._rows)
            for at, bucket in enumerate(ROW_BUCKETS, ROWS):
                if count[at] > before[at]:
                    self._seen[bucket] = busy
        self._flushed, self._attended_before = list(count), self._attended

    def _count_done(self) -> None:
        """Count the requests that ended since the last time: all at once, which costs half of one by one."""
        count, done, loading, number = self.counters, self._done, self._loading, float(len(self._done))
        came, took, until_first, well = list[float](), list[float](), list[float](), done
        for request in done:
            at = request.at
            came.append(at)
            took.append(request.ended - at)
            until_first.append(request.first - at)
        if loading:
            took, until_first = ([time + loading for time in times] for times in (took, until_first))
        if self._errors or self.model.fault.broken_sessions or max(took) > self._timeout:
            self._fail(took, until_first)
            well = [request for request, time in zip(done, took, strict=True) if time < math.inf]
        admission = batch = prefill = decode = 0.0  # of the successful ones
        for request in well:
            admitted, rowed, first = request.admitted, request.rowed, request.first
            admission += admitted - request.at
            batch += rowed - admitted
            prefill += first - rowed
            decode += request.ended - first
        count[OK] += len(well)
        for start, times in ((WITHIN, took), (FIRST, until_first)):
            ordered, below = sorted(times), 0
            for slot, edge in enumerate(_EDGES, start):
                within = bisect_right(ordered, edge, below)
                count[slot] += within - below
                below = within
        self.ended += zip(came, took, until_first, strict=True)
        for counter, grown in (
            (ADMISSION, admission),
            (BATCH, batch),
            (PREFILL, prefill),
            (DECODE, decode),
            (OUT, sum([request.out for request in done])),
            (USED, number * self._prefetched[0]),
            (WASTED, number * self._prefetched[1]),
            (EVICTED, number),
            (TIER_LOAD, len(well) * loading),
            (DECODING, number * loading * self.model.decoding),
        ):
            count[counter] += grown
        self._served += number
        done.clear()

    def _fail(self, took: list[float], first: list[float]) -> None:
        """Requests that fail take for ever."""
        fault = self.model.fault
        for index, time in enumerate(took):
            broken = fault.broken_sessions and fault.breaks(self._done[index].session)
            if broken or (self._errors and self._coin() < self._errors):
                failed = ERROR
            elif time > self._timeout:
                failed = TIMEOUT
            else:
                continue
            self.counters[failed] += 1.0
            took[index] = first[index] = math.inf

    def curve(self) -> dict[int, float]:
        """The curve of the engine's meter: measured where steps were, else the start-up measurement in
        proportion to the nearest measured bucket."""
        busy, slow = sum(self.counters[SECONDS:ROWS]), self.slow * self.outlier
        top, row_s = len(self._table) - 1, self._context_s * self._mean_context
        live = {
            bucket: (self._table[min(bucket, top)] + row_s * min(bucket, top)) * slow
            for bucket, seen in self._seen.items()
            if busy - seen <= FRESH_BUSY_S
        }
        return completed(live, self.model.started_curve())

    def marginal_gain(self) -> float:
        """Relative gain of tokens/s by one more row, as the engine's meter defines it."""
        rows = self._mean_rows
        if self.model.marginal_gain is not None:
            return self.model.marginal_gain(max(1, len(self._rows)))
        return marginal_gain(self.curve(), rows, self._mean_prefill_s)

    def sample(self, now: float, windows: Mapping[str, float]) -> Sample:
        """Metrics over windows of given lengths (s) that end at the last scrape."""
        scrapes, ratio = self.scrapes, self.model.memory(self.config)
        idle = min(len(self.waiting), self._idle_slots)
        memory = MemoryUse(ratio, MEMORY_LIMIT_BYTES, 200 * MIB, 256 * MIB)
        return Sample(
            windows={name: scrapes.counts(now, length) for name, length in windows.items()},
            gauges=Gauges(
                waiting=float(len(self.waiting) - idle),
                running=float(self.held + idle),
                memory_ratio=ratio,
                marginal_gain=self.marginal_gain(),
                cached_bytes=memory.cached_bytes,
                budget_bytes=memory.budget_bytes,
                generation=self.generation,
                memory_limit_bytes=memory.limit_bytes,
                host=memory,
                curve=self.curve(),
            ),
            age_s=now - scrapes.last_at,
            coverage_s=now - self.ready_at,
        )

    def describe(self) -> AdminConfig:
        """The answer of ``GET /admin/config``; the same object until the configuration changes."""
        if (described := self._described) is None or (described.generation, described.epoch) != (
            self.generation,
            self.epoch,
        ):
            described = self._described = AdminConfig(
                contract_version=1,
                version="simulated",
                instance=f"{self.uid}.{self.restarts}",
                model="simulated",
                generation=self.generation,
                epoch=self.epoch,
                config=KVCacheConfig.model_validate(self.config, context=QUIET),
                converging=False,
                ceilings={"maxTokens": 65536},
                knobs=list(KNOBS),
                not_yet_effective=[],
            )
        return described

    def apply(self, patch: ConfigPatch) -> ApplyReport:
        """Apply a patch at once, as ``PATCH /admin/config`` does; the caller has checked the epoch."""
        changed = [name for name, item in patch.values.items() if self.config.get(name) != item]
        self.generation, self.epoch = patch.generation, patch.epoch
        self.config = {**self.config, **patch.values}
        return ApplyReport(
            generation=self.generation,
            epoch=self.epoch,
            changed=changed,
            blocks_kept=0,
            blocks_lost=0,
            converging=False,
        )
