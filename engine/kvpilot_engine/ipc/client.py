"""Client of a core over its socket, for asyncio: requests, configuration changes, samples."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import msgspec

from kvpilot_engine.contract import ApplyReport
from kvpilot_engine.errors import ChangeRefusedError, CoreUnavailableError, RequestCancelledError, StartError
from kvpilot_engine.ipc import messages
from kvpilot_engine.ipc.framing import FrameReader, frame
from kvpilot_engine.ipc.messages import CoreStart
from kvpilot_engine.ipc.spawn import CoreProcess

START_TIMEOUT_S = 300.0
"""Longest time from the spawn of a core to its ``Ready``."""

GRACE_S = 5.0
"""Time that the front waits for the core beyond the time limit of a request."""

A = TypeVar("A", messages.Applied, messages.Described, messages.Sampled)


class Core(Protocol):
    """A started core: a process, or a thread of this process."""

    socket: Any

    @property
    def pid(self) -> int:
        """Process id."""

    def end(self, timeout_s: float) -> str:
        """Wait for its end, at most ``timeout_s``; how it ended, in words."""


class RequestHandle:
    """One request in the core. End it with :meth:`cancel` if its result is not awaited.

    Attributes:
        ids: all new tokens so far.
        finished: the last message, once it is there.
        first_token_at: clock of the front at the first token; None before it.
        gaps_s: seconds between the arrivals of consecutive tokens.
        left: called once when the core no longer holds the request.
    """

    __slots__ = (
        "_abort",
        "_failure",
        "_taken",
        "_waiter",
        "_wants_tokens",
        "finished",
        "first_token_at",
        "gaps_s",
        "id",
        "ids",
        "last_token_at",
        "left",
    )

    def __init__(
        self, request_id: str, abort: Callable[[RequestHandle], None], left: Callable[[], None]
    ) -> None:
        self.id = request_id
        self.left = left
        self.ids: list[int] = []
        self.finished: messages.Finished | None = None
        self.first_token_at: float | None = None
        self.last_token_at = 0.0
        self.gaps_s: list[float] = []
        self._abort = abort
        self._failure: Exception | None = None
        self._taken = 0
        self._waiter: asyncio.Future[None] | None = None
        self._wants_tokens = False

    def arrived(self, ids: list[int], now: float) -> None:
        """Take new tokens from the socket."""
        if self.first_token_at is None:
            self.first_token_at = now
        else:
            self.gaps_s.append(now - self.last_token_at)
        if len(ids) > 1:  # tokens of one message arrived together
            self.gaps_s.extend([0.0] * (len(ids) - 1))
        self.last_token_at = now
        self.ids += ids
        if self._wants_tokens:
            self._wake()

    def ended(self, finished: messages.Finished) -> None:
        """Take the last message from the socket."""
        self.finished = finished
        self._wake()

    def fail(self, failure: Exception) -> None:
        """End the request in the front: a waiter gets ``failure``."""
        if self.finished is None and self._failure is None:
            self._failure = failure
            self._wake()

    def cancel(self) -> None:
        """The client left: the core frees what the request holds; a waiter gets RequestCancelledError."""
        self.expire(RequestCancelledError("the client closed the request"))

    def expire(self, failure: Exception) -> None:
        """End the request in the front and in the core: a waiter gets ``failure``."""
        if self.finished is None and self._failure is None:
            self._abort(self)
            self.fail(failure)

    def stop(self) -> None:
        """End the request in the core and still wait for ``finished``: used at a stop string."""
        if self.finished is None and self._failure is None:
            self._abort(self)

    async def tokens(self) -> list[int]:
        """New tokens since the last call, at least one; empty once the request has finished.

        Raises:
            CoreUnavailableError, RequestCancelledError: when it ended without ``finished``.
        """
        self._wants_tokens = True
        while self._taken == len(self.ids) and self.finished is None and self._failure is None:
            await self._wait()
        if self._failure is not None:
            raise self._failure
        new = self.ids[self._taken :]
        self._taken = len(self.ids)
        return new

    async def result(self) -> messages.Finished:
        """The last message; the tokens are in ``ids``.

        Raises:
            CoreUnavailableError, RequestCancelledError: when it ended without ``finished``.
        """
        self._wants_tokens = False
        while self.finished is None and self._failure is None:
            await self._wait()
        if self._failure is not None:
            raise self._failure
        assert self.finished is not None
        return self.finished

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Wire(asyncio.Protocol):
    """Decodes what the core sends and hands it to the client."""

    def __init__(self, client: CoreClient) -> None:
        self._client = client
        self._reader: FrameReader[messages.FromCore] = FrameReader(messages.FromCore)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        for message in self._reader.feed(data):
            self._client.dispatch(message, now)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.lost()


class CoreClient:
    """Requests to one core, over its socket. All calls from the event loop that started it.

    Attributes:
        described: the core's answer at start.
        loss: why the core is gone; None while it is there.
        lost_event: set once the core is gone.
    """

    described: messages.Described

    def __init__(self, core: Core) -> None:
        self.core = core
        self.lost_event = asyncio.Event()
        self.loss: str | None = None
        self._closing = False
        self._numbers = itertools.count(1)
        self._open: dict[str, RequestHandle] = {}
        self._answers: dict[str, asyncio.Future[Any]] = {}
        self._ready: asyncio.Future[messages.Described] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.WriteTransport | None = None
        self._failed: str | None = None

    @classmethod
    async def start(cls, start: CoreStart, core: Callable[[CoreStart], Core] = CoreProcess) -> CoreClient:
        """Spawn a core and wait until its model is loaded.

        Raises:
            StartError: with the core's reason, or after START_TIMEOUT_S.
        """
        client = cls(core(start))
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_unix_connection(lambda: _Wire(client), sock=client.core.socket)
        client._transport = transport
        try:
            client.described = await asyncio.wait_for(asyncio.shield(client._ready), START_TIMEOUT_S)
        except TimeoutError:
            await client.close(0.0)
            raise StartError(f"the core process was not ready within {START_TIMEOUT_S:.0f} s") from None
        except BaseException:
            await client.close(0.0)
            raise
        return client

    @property
    def open_requests(self) -> int:
        """Requests that the core holds."""
        return len(self._open)

    def expire_all(self, failure: Exception) -> None:
        """End every open request with ``failure``."""
        for handle in list(self._open.values()):
            handle.expire(failure)

    def next_id(self) -> str:
        """A request id that this client has not used; safe from any thread."""
        return str(next(self._numbers))

    def generate(self, request: messages.Generate, left: Callable[[], None] = lambda: None) -> RequestHandle:
        """Send a request to the core, which calls ``left`` once it holds the request no longer.

        Raises:
            CoreUnavailableError: the core is gone.
        """
        self._require()
        sent = frame(request)  # before it is registered: a message that cannot be encoded gets no answer
        handle = RequestHandle(request.id, self._abort, left)
        self._open[request.id] = handle
        self._write(sent)
        return handle

    async def apply(self, epoch: int, generation: int, values: dict[str, Any]) -> ApplyReport:
        """Change the configuration, hot.

        Raises:
            ChangeRefusedError: and nothing has changed.
            CoreUnavailableError: the core is gone.
        """
        for name, value in values.items():
            _require_encodable(name, value)
        change = messages.Apply(self.next_id(), epoch, generation, values)
        applied = await self._ask(change, messages.Applied)
        return ApplyReport(
            generation=applied.generation,
            epoch=applied.epoch,
            changed=applied.changed,
            blocks_kept=applied.blocks_kept,
            blocks_lost=applied.blocks_lost,
            converging=applied.converging,
        )

    async def describe(self) -> messages.Described:
        """The live configuration."""
        return await self._ask(messages.Describe(self.next_id()), messages.Described)

    async def sample(self) -> messages.Sampled:
        """Counters and gauges, now."""
        return await self._ask(messages.Sample(self.next_id()), messages.Sampled)

    async def close(self, timeout_s: float = 10.0) -> None:
        """Let the core finish what is running within ``timeout_s``, then end it."""
        self._closing = True
        if self._transport is not None and not self._transport.is_closing():
            self._send(messages.Stop())
            try:
                await asyncio.wait_for(self.lost_event.wait(), timeout_s)
            except TimeoutError:
                self._transport.abort()
        self.core.end(1.0)  # its socket is closed: this takes milliseconds
        self._lose("the engine was shut down")

    def dispatch(self, message: messages.FromCore, now: float) -> None:
        """Hand a message of the core to its waiter."""
        match message:
            case messages.Tokens():
                if (handle := self._open.get(message.id)) is not None:
                    handle.arrived(message.ids, now)
            case messages.Finished():
                if (handle := self._open.pop(message.id, None)) is not None:
                    handle.ended(message)
                    handle.left()
            case messages.Ready():
                if not self._ready.done():
                    self._ready.set_result(message.described)
            case messages.Failed():
                self._failed = message.message
            case _:
                if (answer := self._answers.pop(message.id, None)) is not None and not answer.done():
                    answer.set_result(message)

    def lost(self) -> None:
        """The socket has closed: fail every open request and question."""
        if self._failed is not None:
            self._lose(self._failed)
        elif self._closing:
            self._lose("the engine was shut down")
        else:
            self._lose(f"the engine's core process ended unexpectedly ({self.core.end(1.0)})")

    def _lose(self, reason: str) -> None:
        if self.loss is not None:
            return
        self.loss = reason
        if not self._ready.done():
            self._ready.set_exception(StartError(reason))
        lost, self._open = list(self._open.values()), {}
        for handle in lost:
            handle.fail(CoreUnavailableError(reason))
            handle.left()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(CoreUnavailableError(reason))
        self._answers.clear()
        self.lost_event.set()

    def _require(self) -> None:
        if self.loss is not None:
            raise CoreUnavailableError(self.loss)

    def _abort(self, handle: RequestHandle) -> None:
        if self.loss is None:
            self._send(messages.Abort(handle.id))

    def _send(self, message: msgspec.Struct) -> None:
        self._write(frame(message))

    def _write(self, framed: bytes) -> None:
        assert self._transport is not None
        self._transport.write(framed)

    async def _ask(self, question: Any, kind: type[A]) -> A:
        self._require()
        sent = frame(question)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[question.id] = answer
        self._write(sent)
        reply = await answer
        if isinstance(reply, messages.Refused):
            raise ChangeRefusedError(reply.code, reply.message)  # type: ignore[arg-type]  # checked by the core
        assert isinstance(reply, kind)
        return reply


def _require_encodable(name: str, value: Any) -> None:
    """Refuse a value that msgpack cannot encode, such as an integer of more than 64 bits."""
    try:
        msgspec.msgpack.encode(value)
    except (OverflowError, TypeError) as error:
        raise ChangeRefusedError("invalid", f"{name}: got {value!r:.60}; {error}") from None
