"""The path of a request through the front, the same for HTTP and for the Python API.

A request arrives (:meth:`Session.arrive`), is tokenised and checked (:meth:`Session.compose`), is admitted
(:meth:`Ticket.wait` or :meth:`Ticket.enter_or_shed`), is sent to the core (:meth:`Ticket.send`), is answered
(:meth:`Session.answer`), and is accounted (:meth:`Ticket.succeed` or :meth:`Ticket.fail`).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from typing import Any, Protocol

from kvpilot_engine import memory
from kvpilot_engine.contract import CONTRACT_VERSION, VERSION, AdminConfig, ApplyReport, KVCacheConfig
from kvpilot_engine.contract.config import QUIET
from kvpilot_engine.contract.knobs import CATALOGUE
from kvpilot_engine.contract.metrics import Outcome, Stage
from kvpilot_engine.errors import (
    CoreUnavailableError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
    RequestTimeoutError,
)
from kvpilot_engine.frontend.account import RATE_WINDOW, Account, Completed
from kvpilot_engine.frontend.admission import AdmissionQueue
from kvpilot_engine.frontend.completion import Answer, Prompt, RequestFields, check_length
from kvpilot_engine.frontend.tokenizer import Tokenizer, TokenizerError
from kvpilot_engine.ipc import messages
from kvpilot_engine.ipc.client import GRACE_S, CoreClient, RequestHandle


class Cancellable(Protocol):
    """A timer or a task that guards a request."""

    def cancel(self) -> Any:
        """End it."""


class Ticket:
    """One request on its way: admitted, sent, and accounted exactly once.

    Attributes:
        arrived_at: monotonic clock, s.
    """

    __slots__ = ("_guards", "_handle", "_session", "_settled", "_waited_s", "arrived_at")

    def __init__(self, session: Session, arrived_at: float) -> None:
        self.arrived_at = arrived_at
        self._session = session
        self._handle: RequestHandle | None = None
        self._guards: list[Cancellable] = []
        self._waited_s = 0.0
        self._settled = False

    def enter_or_shed(self) -> None:
        """Be admitted, or be refused at once.

        Raises:
            QueueFullError: ``max_queue`` requests wait already.
        """
        session = self._session
        if not session.queue.enter():
            waiting = session.queue.admitted - session.config.num_workers
            raise QueueFullError(waiting, session.config.max_queue, session.account.retry_after_s(waiting))

    async def wait(self, priority: int) -> None:
        """Be admitted, waiting in the order of priority.

        Raises:
            CoreUnavailableError: the session was closed.
        """
        began = time.monotonic()
        await self._session.queue.wait(priority)
        self._waited_s = time.monotonic() - began

    def send(self, message: messages.Generate) -> RequestHandle:
        """Send the admitted request to the core, guarded by a timer in case that the core hangs.

        Raises:
            CoreUnavailableError: there is no core.
        """
        queue = self._session.queue
        try:
            handle = self._handle = self._session.core().generate(message, queue.leave)
        except BaseException:
            queue.leave()
            raise
        timeout = RequestTimeoutError(f"no answer within request_timeout_s of {message.timeout_s:g} s")
        loop = asyncio.get_running_loop()
        self.guard(loop.call_later(message.timeout_s + GRACE_S, handle.expire, timeout))
        return handle

    def guard(self, guard: Cancellable) -> None:
        """Cancel ``guard`` when the request has ended."""
        self._guards.append(guard)

    def succeed(self) -> Completed:
        """Account a request whose answer is complete; its figures."""
        handle = self._handle
        assert handle is not None
        assert handle.finished is not None
        now, first = time.monotonic(), handle.first_token_at
        stages = dict(handle.finished.stages)
        stages[Stage.ADMISSION_WAIT] = stages.get(Stage.ADMISSION_WAIT, 0.0) + self._waited_s
        done = Completed(
            at=now,
            latency_s=now - self.arrived_at,
            first_token_s=None if first is None else first - self.arrived_at,
            stages=stages,
        )
        if self._settle():
            self._session.account.complete(done, handle.gaps_s)
        return done

    def fail(self, error: BaseException) -> None:
        """Account a request that ended with ``error``, and free what it still holds in the core."""
        if not self._settle():
            return
        outcome = error.outcome if isinstance(error, EngineError) else Outcome.ERROR
        if isinstance(error, asyncio.CancelledError):
            outcome = Outcome.CANCELLED
        self._session.account.outcomes[outcome] += 1

    def _settle(self) -> bool:
        """Release everything; True the first time."""
        first, self._settled = not self._settled, True
        for guard in self._guards:
            guard.cancel()
        if self._handle is not None:
            self._handle.cancel()  # nothing, if it has finished
        return first


class Session:
    """One engine as its callers see it. All calls but :meth:`compose` from one event loop.

    Args:
        recent: completions to keep for percentiles and rates.

    Attributes:
        client: None until the core is ready.
        config: the configuration in force.
        draining: termination was asked for; readiness is false, what comes is still served.
    """

    def __init__(
        self, model: str, config: KVCacheConfig, tokenizer: Tokenizer, recent: int = RATE_WINDOW
    ) -> None:
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        self.client: CoreClient | None = None
        self.draining = False
        self.account = Account(recent)
        self.queue = AdmissionQueue(config.num_workers + config.max_queue)
        self._limit_bytes = memory.limit_bytes()

    def attach(self, client: CoreClient) -> None:
        """The core is ready."""
        self.client = client
        self._adopt(client.described)

    async def close(self, timeout_s: float) -> None:
        """Refuse who waits, let the core finish what runs within ``timeout_s``, and end it."""
        self.queue.close(CoreUnavailableError("the engine was shut down"))
        if self.client is not None:
            await self.client.close(timeout_s)

    @property
    def fatal(self) -> str | None:
        """Why nothing can be served any more; None otherwise."""
        return None if self.client is None else self.client.loss

    @property
    def not_ready(self) -> str | None:
        """Why no traffic should be sent here; None when ready."""
        if self.fatal is not None:
            return self.fatal
        if self.client is None:
            return "the model is still loading"
        return "draining" if self.draining else None

    def core(self) -> CoreClient:
        """The core's client.

        Raises:
            CoreUnavailableError: while the core loads, and after it ended.
        """
        if self.client is None:
            raise CoreUnavailableError("the model is still loading")
        if self.client.loss is not None:
            raise CoreUnavailableError(self.client.loss)
        return self.client

    def arrive(self, arrived_at: float | None = None) -> Ticket:
        """Count a request that arrived, now or at ``arrived_at`` (monotonic clock)."""
        self.account.arrivals += 1
        return Ticket(self, time.monotonic() if arrived_at is None else arrived_at)

    def compose(
        self, prompt: Prompt, fields: RequestFields, session_id: str | None = None
    ) -> messages.Generate:
        """Tokenise the prompt, check its length, and make the message for the core. Safe from any thread.

        Args:
            session_id: used where ``fields`` have none.

        Raises:
            InvalidRequestError: naming the field, its value and what is allowed.
            CoreUnavailableError: there is no core.
        """
        core = self.core()
        tokens = self._tokenise(prompt)
        limit = prompt.max_new_tokens
        check_length(prompt.field, len(tokens), prompt.limit_field, limit or 1, core.described.context_length)
        return messages.Generate(
            id=core.next_id() + secrets.token_hex(8),
            prompt=tokens,
            max_new_tokens=limit,
            temperature=1.0 if fields.temperature is None else fields.temperature,
            top_p=1.0 if fields.top_p is None else fields.top_p,
            seed=fields.seed,
            priority=fields.priority,
            session_id=fields.session_id or session_id,
            exact_only=fields.exact_only,
            timeout_s=self.config.request_timeout_s,
            stop_ids=list(self.tokenizer.eos_ids),
        )

    def _tokenise(self, prompt: Prompt) -> list[int]:
        try:
            if isinstance(prompt.content, str):
                return self.tokenizer.encode(prompt.content)
            if isinstance(prompt.content, tuple):
                return self.tokenizer.apply_chat_template(prompt.content)
        except TokenizerError as error:
            raise InvalidRequestError(str(error), prompt.field) from None
        if not all(0 <= token < self.tokenizer.vocab_size for token in prompt.content):
            bound = self.tokenizer.vocab_size - 1
            raise InvalidRequestError(
                f"{prompt.field}: token ids must lie between 0 and {bound}", prompt.field
            )
        return prompt.content

    def answer(self, handle: RequestHandle, stops: tuple[str, ...] = ()) -> Answer:
        """The text of a request that was sent."""
        return Answer(handle, self.tokenizer, stops)

    async def sample(self) -> tuple[messages.Sampled, memory.Memory]:
        """Counters and gauges of the core, and the memory of core and front together."""
        core = self.core()
        sampled = await core.sample()
        in_process = core.core.pid == os.getpid()  # then the core has counted this process already
        front_bytes = 0 if in_process else await asyncio.to_thread(memory.anonymous_bytes)
        return sampled, memory.memory_of(sampled, front_bytes, self._limit_bytes)

    async def describe(self) -> AdminConfig:
        """The live configuration, read from the core."""
        described = await self.core().describe()
        self._adopt(described)
        return AdminConfig(
            contract_version=CONTRACT_VERSION,
            version=VERSION,
            instance=described.instance,
            model=described.model,
            generation=described.generation,
            epoch=described.epoch,
            config=self.config,
            converging=described.converging,
            ceilings=described.ceilings,
            knobs=[knob.resource_name for knob in CATALOGUE],
            not_yet_effective=[f"{n.field}: {n.message}" for n in self.config.not_yet_effective()],
        )

    async def apply(self, epoch: int, generation: int, values: dict[str, Any]) -> ApplyReport:
        """Change hot fields, whole or not at all.

        Raises:
            ChangeRefusedError: and nothing has changed.
        """
        core = self.core()
        report = await core.apply(epoch, generation, values)
        self._adopt(await core.describe())
        return report

    def _adopt(self, described: messages.Described) -> None:
        self.config = KVCacheConfig.model_validate(described.config, context=QUIET)
        self.queue.resize(self.config.num_workers + self.config.max_queue)
