"""The state of the front process: the core's client, admission, the live configuration, accounting."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from typing import Any

import kvpilot_engine
from kvpilot_engine import memory, protocol
from kvpilot_engine.client import GRACE_S, CoreClient, Generation
from kvpilot_engine.contract import CONTRACT_VERSION, AdminConfig, ApplyReport, KVCacheConfig
from kvpilot_engine.contract.config import QUIET
from kvpilot_engine.contract.knobs import CATALOGUE
from kvpilot_engine.contract.metrics import Outcome
from kvpilot_engine.errors import CoreUnavailableError, RequestTimeoutError
from kvpilot_engine.server.errors import shed
from kvpilot_engine.server.metrics import SAMPLE_AGE_S, FrontMetrics
from kvpilot_engine.tokenizer import Tokenizer

_RATE_WINDOW = 64  # ends of requests behind the estimate of Retry-After
_MAX_RETRY_AFTER_S = 30


class Ticket:
    """One HTTP request's account: it is settled exactly once."""

    __slots__ = ("_front", "_settled", "arrived_at")

    def __init__(self, front: Front) -> None:
        self._front = front
        self._settled = False
        self.arrived_at = time.monotonic()
        front.metrics.arrivals.inc()

    def ok(self, generation: Generation) -> None:
        """The last byte of a good answer is out."""
        if self._settled:
            return
        self._settled = True
        assert generation.finished is not None
        now = time.monotonic()
        first = generation.first_token_at
        self._front.ends.append(now)
        self._front.metrics.succeeded(
            generation.finished,
            now - self.arrived_at,
            None if first is None else first - self.arrived_at,
            generation.gaps_s,
        )

    def ended(self, outcome: Outcome) -> None:
        """It ended otherwise."""
        if not self._settled:
            self._settled = True
            self._front.metrics.outcomes[outcome].inc()


class Front:
    """What the routes share.

    Attributes:
        client: None until the core is ready.
        fatal: why nothing can be served any more; None while all is well.
        draining: termination was asked for; readiness is false, what comes is still served.
    """

    def __init__(self, model: str, config: KVCacheConfig, tokenizer: Tokenizer) -> None:
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        self.client: CoreClient | None = None
        self.fatal: str | None = None
        self.draining = False
        self.created = int(time.time())
        self.context_length = 0
        self.ends: deque[float] = deque(maxlen=_RATE_WINDOW)
        self.metrics = FrontMetrics(lambda: self._latest)
        self._latest: tuple[protocol.Sampled, memory.Memory] | None = None
        self._sampled_at = -math.inf
        self._sampling: asyncio.Task[None] | None = None
        self._limit_bytes = memory.limit_bytes()

    def attach(self, client: CoreClient) -> None:
        """The core is ready."""
        self.client = client
        self.context_length = client.described.context_length
        self._adopt(client.described)
        self.metrics.info(client.described, kvpilot_engine.__version__, CONTRACT_VERSION)

    def core(self) -> CoreClient:
        """The core's client.

        Raises:
            CoreUnavailableError: while it loads, and after it died.
        """
        if self.fatal is not None:
            raise CoreUnavailableError(self.fatal)
        if self.client is None:
            raise CoreUnavailableError("the model is still loading")
        return self.client

    def not_ready(self) -> str | None:
        """Why no traffic should come here; None when ready."""
        if self.fatal is not None:
            return self.fatal
        if self.client is None:
            return "the model is still loading"
        return "draining" if self.draining else None

    def admit(self) -> CoreClient:
        """The core's client, for one more request.

        Every open request beyond ``num_workers`` waits for a slot, so the front knows the queue exactly.

        Raises:
            ApiError: 429 with Retry-After when ``max_queue`` requests wait already.
        """
        client = self.core()
        waiting = client.open_requests - self.config.num_workers
        if waiting >= self.config.max_queue:
            raise shed(waiting, self.config.max_queue, self._retry_after(waiting))
        return client

    def _retry_after(self, waiting: int) -> int:
        """Seconds until the queue has drained at the rate of the latest ends."""
        if len(self.ends) < 2 or self.ends[-1] <= self.ends[0]:
            return 1
        rate = (len(self.ends) - 1) / (self.ends[-1] - self.ends[0])
        return max(1, min(_MAX_RETRY_AFTER_S, math.ceil(waiting / rate)))

    @property
    def farewell(self) -> list[tuple[bytes, bytes]]:
        """Headers of an answer that tell its client to come back on another connection, while draining."""
        return [(b"connection", b"close")] if self.draining else []

    def send(self, request: protocol.Generate) -> tuple[Generation, asyncio.TimerHandle]:
        """Send a request, guarded by a timer in case that the core hangs."""
        generation = self.core().generate(request)
        timer = asyncio.get_running_loop().call_later(
            request.timeout_s + GRACE_S,
            generation.expire,
            RequestTimeoutError(f"no answer within request_timeout_s of {request.timeout_s:g} s"),
        )
        return generation, timer

    async def metrics_text(self) -> bytes:
        """The metrics page; the core is asked at most twice a second."""
        if self.client is not None and time.monotonic() - self._sampled_at > SAMPLE_AGE_S:
            if self._sampling is None or self._sampling.done():
                self._sampling = asyncio.ensure_future(self._sample())
            await self._sampling
        return self.metrics.text()

    async def _sample(self) -> None:
        sampled = await self.core().sample()
        front_bytes = await asyncio.to_thread(memory.anonymous_bytes)
        self._latest = sampled, memory.memory_of(sampled, front_bytes, self._limit_bytes)
        self._sampled_at = time.monotonic()

    async def describe(self) -> AdminConfig:
        """The live configuration, read from the core."""
        described = await self.core().describe()
        self._adopt(described)
        return AdminConfig(
            contract_version=CONTRACT_VERSION,
            version=kvpilot_engine.__version__,
            instance=described.instance,
            model=described.model,
            generation=described.generation,
            epoch=described.epoch,
            config=self.config,
            converging=described.converging,
            ceilings=described.ceilings,
            knobs=[knob.resource_name for knob in CATALOGUE if knob.hot],
            not_yet_effective=[f"{n.field}: {n.message}" for n in self.config.not_yet_effective()],
        )

    async def apply(self, epoch: int, generation: int, values: dict[str, Any]) -> ApplyReport:
        """Change the configuration.

        Raises:
            ChangeRefusedError: and nothing has changed.
        """
        client = self.core()
        report = await client.apply(epoch, generation, values)
        self._adopt(await client.describe())
        return report

    def _adopt(self, described: protocol.Described) -> None:
        self.config = KVCacheConfig.model_validate(described.config, context=QUIET)
