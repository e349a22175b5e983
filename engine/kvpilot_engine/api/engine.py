"""KVCacheEngine: the engine for Python programs, over a core process and a session in a background thread.

Awaitable methods work from any event loop, also from several at once: the socket belongs to the event loop of
the background thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Annotated, Any, Self, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel, to_snake

from kvpilot_engine.api import stats
from kvpilot_engine.contract import ApplyReport, KVCacheConfig, config_errors
from kvpilot_engine.contract.config import warn_of
from kvpilot_engine.errors import CoreUnavailableError, InvalidRequestError
from kvpilot_engine.frontend.completion import (
    DEFAULT_NEW_TOKENS,
    Prompt,
    RequestFields,
    Temperature,
    TopP,
    fault_lines,
)
from kvpilot_engine.frontend.session import Session
from kvpilot_engine.frontend.tokenizer import load_tokenizer
from kvpilot_engine.ipc import messages
from kvpilot_engine.ipc.client import GRACE_S, Core, CoreClient
from kvpilot_engine.ipc.messages import CoreStart
from kvpilot_engine.ipc.spawn import CoreProcess

MAX_TEXT_CHARACTERS = 100_000
"""Longest text of one request; a prompt must also fit the model's context."""

T = TypeVar("T")


def _present(value: Any) -> Any:
    if isinstance(value, str) and not value:
        raise ValueError("must not be empty")
    return value


class TextRequest(RequestFields):
    """The mapping that :meth:`KVCacheEngine.process_request` takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    text: Annotated[str, BeforeValidator(_present)] = Field(max_length=MAX_TEXT_CHARACTERS)
    max_length: int = Field(DEFAULT_NEW_TOKENS, ge=1, description="New tokens, at most.")
    temperature: Temperature = 0.0
    top_p: TopP = 1.0


def parse_request(request: Mapping[str, Any], where: str = "") -> TextRequest:
    """The validated request.

    Raises:
        InvalidRequestError: naming each wrong field, its value and what is allowed.
    """
    if not isinstance(request, Mapping):
        raise InvalidRequestError(f"{where}request: must be a mapping, got {type(request).__name__}")
    try:
        return TextRequest.model_validate(dict(request))
    except ValidationError as error:
        allowed = ", ".join(TextRequest.model_fields)
        lines = fault_lines(error, f"unknown key, must be one of {allowed}")
        raise InvalidRequestError(where + "; ".join(lines)) from None


class _Runtime:
    """The background thread and its event loop, on which the session lives."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.closed = False
        self._loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="kvpilot-client", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run ``work`` on the loop."""
        if self.closed:
            work.close()
            raise CoreUnavailableError("the engine was shut down")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self, timeout_s: float = 10.0) -> None:
        """End the core and the thread; requests that wait for admission get an error."""
        ended = self.submit(self._end(timeout_s))
        self.closed = True
        ended.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))
        if threading.current_thread() is self.thread:
            return  # the end of a request dropped the engine: this thread cannot wait for itself
        ended.result(timeout_s + GRACE_S)
        self.thread.join(GRACE_S)

    async def _end(self, timeout_s: float) -> None:
        await self.session.close(timeout_s)
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def _in_process(start: CoreStart) -> Core:
    from kvpilot_engine.core.process import CoreThread  # noqa: PLC0415  (torch: only this choice pays for it)

    return CoreThread(start)


class KVCacheEngine:
    """An engine with a paged, tiered KV cache under continuous batching.

    Args:
        config: the settings; defaults without it.
        model: ``builtin/tiny-llama``, ``builtin/tiny-qwen3``, or a directory.
        revision: of the weights.
        inproc: run the core in a thread of this process (tests only: other Python work slows its steps).

    Raises:
        StartError: when it cannot start with this model and configuration.

    Also a context manager, ``with`` or ``async with``; leaving it shuts the engine down.
    """

    def __init__(
        self,
        config: KVCacheConfig | None = None,
        *,
        model: str = "builtin/tiny-llama",
        revision: str = "",
        inproc: bool = False,
    ) -> None:
        config = KVCacheConfig() if config is None else config
        self._session = Session(model, config, load_tokenizer(model), stats.WINDOW)
        self._runtime = _Runtime(self._session)
        # Ends the core at interpreter exit, and when the last reference goes.
        self._finalizer = weakref.finalize(self, self._runtime.close)
        start = CoreStart.of(config, model=model, revision=revision)
        try:
            self._session.attach(self._wait(CoreClient.start(start, _in_process if inproc else CoreProcess)))
        except BaseException:
            self._finalizer()
            raise

    @property
    def config(self) -> KVCacheConfig:
        """The configuration in force."""
        return self._session.config

    @property
    def model(self) -> str:
        """The model's name."""
        return self._session.model

    @property
    def context_length(self) -> int:
        """Prompt and new tokens together, at most."""
        return self._client().described.context_length

    @property
    def core_pid(self) -> int:
        """Process id of the core."""
        return self._client().core.pid

    async def process_request(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Complete one text. A full queue waits, in the order of priority.

        Args:
            request: ``text``, and optionally ``priority`` (higher is more urgent), ``session_id``,
                ``max_length`` (new tokens, 16 by default), ``temperature`` (0, greedy, by default),
                ``top_p``, ``seed``, ``exact_only``.

        Returns:
            ``text``, ``tokens`` (ids), ``finish_reason`` (stop | length), ``prompt_tokens``,
            ``output_tokens``, ``cached_tokens``, ``latency_ms``, ``first_token_ms``, ``stages_ms`` (by stage;
            the wait for the queue counts as admission_wait), ``session_id``, ``priority``.

        Raises:
            InvalidRequestError: for a wrong field, or a prompt that does not fit.
            RequestTimeoutError: when it ran longer than ``request_timeout_s``, the wait for the queue aside.
            CoreUnavailableError: when the engine was shut down or its core died.
        """
        return await self._complete(parse_request(request))

    async def process_batch(
        self,
        requests: Sequence[Mapping[str, Any]],
        batch_size: int | None = None,
        *,
        deduplicate: bool = False,
        prioritise: bool = False,
        prioritize: bool = False,
        return_exceptions: bool = False,
    ) -> list[dict[str, Any]]:
        """Complete several texts; results in the order of ``requests``.

        All are validated before the first is sent.

        Args:
            requests: as for :meth:`process_request`.
            batch_size: requests under way at once; all of them without it.
            deduplicate: serve requests that are equal in every field once.
            prioritise, prioritize: send in the order of priority, the most urgent first.
            return_exceptions: put an error in its request's place, instead of raising the first one.
        """
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise InvalidRequestError(
                f"batch_size: must be a whole number of at least 1, got {batch_size!r:.80}", "batch_size"
            )
        wanted = [parse_request(request, f"requests.{i}: ") for i, request in enumerate(requests)]
        slots = asyncio.Semaphore(batch_size or max(1, len(wanted)))

        async def one(request: TextRequest) -> dict[str, Any]:
            async with slots:
                return await self._complete(request)

        order = list(range(len(wanted)))
        if prioritise or prioritize:
            order.sort(key=lambda i: -wanted[i].priority)
        tasks: dict[Any, asyncio.Task[dict[str, Any]]] = {}
        keys: list[Any] = [(wanted[i] if deduplicate else i) for i in range(len(wanted))]
        for i in order:
            if keys[i] not in tasks:
                tasks[keys[i]] = asyncio.create_task(one(wanted[i]))
        try:
            done = await asyncio.gather(*tasks.values(), return_exceptions=return_exceptions)
        finally:
            for task in tasks.values():
                task.cancel()
        by_key = dict(zip(tasks, done, strict=True))
        results: list[Any] = [by_key[key] for key in keys]
        return [dict(result) if isinstance(result, dict) else result for result in results]

    def get_stats(self) -> dict[str, Any]:
        """Measurements since the start; latencies over the last 10,000 requests.

        Returns:
            ``total_requests``, ``failed_requests``, ``cancelled_requests`` (by their caller, no failure),
            ``active_requests``, ``throughput`` (requests/s over the last minute),
            ``hit_rate`` and ``miss_rate`` (of prompt tokens), ``hit_rate_ceiling`` (an infinite
            cache's), ``avg_latency``, ``p50_latency``, ``p95_latency``, ``p99_latency``, ``p50_first_token``
            (ms), ``memory_usage`` (used over limit, the larger of host and device), ``memory_bytes``,
            ``memory_limit_bytes``, ``gpu_utilization`` (share of time in steps on a GPU; 0.0 on a CPU),
            ``evictions``, ``preemptions``, ``waiting``, ``running``, ``stages`` (by stage: ``mean_ms``,
            ``p95_ms``, ``share``), ``engine`` (every counter and gauge of the
            core: metric name -> label value, "" without a label -> value).
        """
        return self._wait(self._stats())

    def update_config(self, **changes: Any) -> ApplyReport:
        """Change hot fields, whole or not at all; nothing is restarted and no request is dropped.

        Raises:
            ChangeRefusedError: for a cold field, or a value that does not fit; nothing has changed.

        Warns:
            ConfigWarning: once, listing the changed fields whose value is doubtful or has no effect.
        """
        report = self._wait(self._apply(changes))
        self._warn(changes)
        return report

    async def apply(self, changes: Mapping[str, Any]) -> ApplyReport:
        """:meth:`update_config`, awaitable."""
        report = await asyncio.wrap_future(self._runtime.submit(self._apply(changes)))
        self._warn(changes)
        return report

    def _warn(self, changes: Mapping[str, Any]) -> None:
        """Warn of changed fields as the constructor warns of all."""
        changed = {to_camel(name) for name in changes}
        notices = self.config.updated(dict(changes)).notices()
        warn_of([notice for notice in notices if to_camel(notice.field) in changed], stacklevel=4)

    def validate_configuration(self, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Check a configuration without applying it; the one in force without ``values``.

        Returns:
            ``valid``, ``errors`` and ``warnings`` (one line each, naming the field).
        """
        config, errors = self.config, []
        if values is not None:
            try:
                config = self.config.updated(dict(values))
            except ValidationError as error:
                errors = config_errors(error)
        warnings = [] if errors else [f"{note.field}: {note.message}" for note in config.notices()]
        return {"valid": not errors, "errors": errors, "warnings": warnings}

    def get_health_status(self) -> dict[str, Any]:
        """``status`` (healthy | unhealthy), ``reason`` when unhealthy, ``core_pid``, ``active_requests``."""
        client = self._client()
        reason = "the engine was shut down" if self._runtime.closed else self._session.fatal
        status: dict[str, Any] = {"status": "healthy" if reason is None else "unhealthy"}
        if reason is not None:
            status["reason"] = reason
        return status | {"core_pid": client.core.pid, "active_requests": client.open_requests}

    def shutdown(self, timeout_s: float = 10.0) -> None:
        """Finish what is running, then end the core; a second call does nothing.

        Requests that wait, or are not done within ``timeout_s``, get a ``CoreUnavailableError``.
        """
        if self._finalizer.detach() is not None:
            self._runtime.close(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.shutdown)

    def _client(self) -> CoreClient:
        assert self._session.client is not None
        return self._session.client

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runtime.submit(work).result()

    async def _complete(self, request: TextRequest) -> dict[str, Any]:
        arrived_at = time.monotonic()
        prompt = Prompt(request.text, "text", request.max_length, "max_length")
        message = self._session.compose(prompt, request)  # here, so that tokenising does not delay the socket
        return await asyncio.wrap_future(self._runtime.submit(self._run(message, arrived_at)))

    async def _run(self, message: messages.Generate, arrived_at: float) -> dict[str, Any]:
        ticket = self._session.arrive(arrived_at)
        try:
            await ticket.wait(message.priority)
            handle = ticket.send(message)
            text = await self._session.answer(handle).whole()
        except BaseException as error:
            ticket.fail(error)
            if self._runtime.closed and isinstance(error, asyncio.CancelledError):  # not by the caller
                raise CoreUnavailableError("the engine was shut down") from None
            raise
        done, finished = ticket.succeed(), handle.finished
        assert finished is not None
        return {
            "text": text,
            "tokens": handle.ids,
            "finish_reason": finished.reason,
            "prompt_tokens": finished.prompt_tokens,
            "output_tokens": len(handle.ids),
            "cached_tokens": finished.cached_tokens,
            "latency_ms": done.latency_s * 1000,
            "first_token_ms": None if done.first_token_s is None else done.first_token_s * 1000,
            "stages_ms": {stage: seconds * 1000 for stage, seconds in done.stages.items()},
            "session_id": message.session_id,
            "priority": message.priority,
        }

    async def _stats(self) -> dict[str, Any]:
        session, client = self._session, self._client()
        sampled, memory = await session.sample()
        on_gpu = client.described.device.startswith("cuda")
        return stats.report(session.account, sampled, memory, on_gpu) | {
            "active_requests": client.open_requests + session.queue.waiting,
            "waiting_for_queue": session.queue.waiting,
        }

    def _plain(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Values as JSON has them, such as the name of a torch dtype; the core refuses what is wrong."""
        try:
            plain = self.config.updated(dict(changes)).model_dump(mode="json")
        except ValidationError:
            return dict(changes)
        return {name: plain[to_snake(name)] for name in changes}

    async def _apply(self, changes: Mapping[str, Any]) -> ApplyReport:
        now = await self._session.describe()
        return await self._session.apply(now.epoch, now.generation + 1, self._plain(changes))
