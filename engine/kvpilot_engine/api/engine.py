"""KVCacheEngine: the engine for Python programs. It starts a core process and speaks to it from a thread.

Awaitable methods work from any event loop, one after the other or several at once: the socket belongs to a
loop of its own in a background thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any, Self, TypeVar

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel, to_snake

from kvpilot_engine import memory, protocol
from kvpilot_engine.client import GRACE_S, CoreClient
from kvpilot_engine.completion import (
    DEFAULT_NEW_TOKENS,
    PRIORITY_BOUND,
    SEED_BOUND,
    check_length,
    fault_lines,
    raise_unless_complete,
)
from kvpilot_engine.contract import ApplyReport, KVCacheConfig, config_errors
from kvpilot_engine.contract.config import QUIET, warn_of
from kvpilot_engine.contract.metrics import Stage
from kvpilot_engine.core import CoreProcess, CoreStart, CoreThread
from kvpilot_engine.errors import CoreUnavailableError, EngineError, InvalidRequestError, RequestTimeoutError
from kvpilot_engine.gate import Gate
from kvpilot_engine.stats import Ended, Statistics
from kvpilot_engine.tokenizer import TokenizerError, load_tokenizer

MAX_TEXT_CHARACTERS = 100_000
"""Longest text of one request; a prompt must also fit the model's context."""

T = TypeVar("T")


def _present(value: Any) -> Any:
    if isinstance(value, str) and not value:
        raise ValueError("must not be empty")
    return value


class TextRequest(BaseModel):
    """What :meth:`KVCacheEngine.process_request` takes, as a mapping."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    text: Annotated[str, BeforeValidator(_present)] = Field(max_length=MAX_TEXT_CHARACTERS)
    priority: int = Field(0, ge=-PRIORITY_BOUND, le=PRIORITY_BOUND, description="Higher is more urgent.")
    session_id: str | None = Field(None, max_length=256)
    max_length: int = Field(DEFAULT_NEW_TOKENS, ge=1, description="New tokens, at most.")
    temperature: float = Field(0.0, ge=0.0, le=2.0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    seed: int | None = Field(None, ge=-SEED_BOUND, lt=SEED_BOUND)
    exact_only: bool = Field(False, description="Use cached pages of exact fidelity only.")


def parse_request(request: Mapping[str, Any], where: str = "") -> TextRequest:
    """The validated request.

    Raises:
        InvalidRequestError: naming each field at fault, its value and what is allowed.
    """
    if not isinstance(request, Mapping):
        raise InvalidRequestError(f"{where}request: must be a mapping, got {type(request).__name__}")
    try:
        return TextRequest.model_validate(dict(request))
    except ValidationError as error:
        allowed = ", ".join(TextRequest.model_fields)
        lines = fault_lines(error, f"unknown key, must be one of {allowed}")
        raise InvalidRequestError(where + "; ".join(lines)) from None


@dataclass
class _Runtime:
    """The background thread, its loop, and what lives on it."""

    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    client: CoreClient | None = None
    closed: bool = False

    @classmethod
    def begin(cls) -> _Runtime:
        loop = asyncio.new_event_loop()

        def run() -> None:
            loop.run_forever()
            loop.close()

        thread = threading.Thread(target=run, name="kvpilot-client", daemon=True)
        thread.start()
        return cls(loop, thread)

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self.closed:
            work.close()
            raise CoreUnavailableError("the engine was shut down")
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self, gate: Gate, timeout_s: float = 10.0) -> None:
        """End the core and the thread; who waits at the gate is turned away."""
        ended = self.submit(self._end(gate, timeout_s))
        self.closed = True
        ended.add_done_callback(lambda _: self.loop.call_soon_threadsafe(self.loop.stop))
        if threading.current_thread() is self.thread:
            return  # a request's end dropped the engine, here: this thread cannot wait for itself
        ended.result(timeout_s + GRACE_S)
        self.thread.join(GRACE_S)

    async def _end(self, gate: Gate, timeout_s: float) -> None:
        gate.close(CoreUnavailableError("the engine was shut down"))
        if self.client is not None:
            await self.client.close(timeout_s)
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


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
        self._config = KVCacheConfig() if config is None else config
        self._model = model
        self._limit_bytes = memory.limit_bytes()
        self._inproc = inproc
        self._tokenizer = load_tokenizer(model)
        self._statistics = Statistics(time.monotonic)
        self._gate = Gate(self._capacity())
        self._runtime = _Runtime.begin()
        # At interpreter exit, and when the last reference goes: no core is left behind.
        self._finalizer = weakref.finalize(self, self._runtime.close, self._gate)
        start = CoreStart.of(self._config, model=model, revision=revision)
        core: Callable[[CoreStart], Any] = CoreThread if inproc else CoreProcess
        try:
            self._runtime.client = self._wait(CoreClient.start(start, core))
        except BaseException:
            self._finalizer()
            raise
        self._described = self._runtime.client.described

    @property
    def config(self) -> KVCacheConfig:
        """The configuration in force."""
        return self._config

    @property
    def model(self) -> str:
        """The model's name."""
        return self._model

    @property
    def context_length(self) -> int:
        """Prompt and new tokens together, at most."""
        return self._described.context_length

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
        """What was measured since the start; latencies over the last 10,000 requests.

        Returns:
            ``total_requests``, ``failed_requests``, ``cancelled_requests`` (by their caller, no failure),
            ``active_requests``, ``throughput`` (requests/s over the last minute),
            ``hit_rate`` and ``miss_rate`` (of prompt tokens), ``hit_rate_ceiling`` (an infinite
            cache's), ``avg_latency``, ``p50_latency``, ``p95_latency``, ``p99_latency``, ``p50_first_token``
            (ms), ``memory_usage`` (used over limit, the larger of host and device), ``memory_bytes``,
            ``memory_limit_bytes``, ``gpu_utilization`` (share of time in steps on a GPU; 0.0 on a CPU),
            ``evictions``, ``preemptions``, ``waiting``, ``running``, ``stages`` (by stage: ``mean_ms``,
            ``p95_ms``, ``share``), ``engine`` (every counter and gauge of the core, by metric name).
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
        """Say of a change what the constructor says of a start."""
        changed = {to_camel(name) for name in changes}
        notices = self._config.updated(dict(changes)).notices()
        warn_of([notice for notice in notices if to_camel(notice.field) in changed], stacklevel=4)

    def validate_configuration(self, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Check a configuration without applying it; the one in force without ``values``.

        Returns:
            ``valid``, ``errors`` and ``warnings`` (one line each, naming the field).
        """
        config, errors = self._config, []
        if values is not None:
            try:
                config = self._config.updated(dict(values))
            except ValidationError as error:
                errors = config_errors(error)
        warnings = [] if errors else [f"{note.field}: {note.message}" for note in config.notices()]
        return {"valid": not errors, "errors": errors, "warnings": warnings}

    def get_health_status(self) -> dict[str, Any]:
        """``status`` (healthy | unhealthy), ``reason`` when unhealthy, ``core_pid``, ``active_requests``."""
        client = self._client()
        reason = "the engine was shut down" if self._runtime.closed else client.loss
        status: dict[str, Any] = {"status": "healthy" if reason is None else "unhealthy"}
        if reason is not None:
            status["reason"] = reason
        return status | {"core_pid": client.core.pid, "active_requests": client.open_requests}

    def shutdown(self, timeout_s: float = 10.0) -> None:
        """Finish what is running, then end the core; again is nothing.

        Requests that wait, or are not done within ``timeout_s``, get a ``CoreUnavailableError``.
        """
        if self._finalizer.detach() is not None:
            self._runtime.close(self._gate, timeout_s)

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
        assert self._runtime.client is not None
        return self._runtime.client

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runtime.submit(work).result()

    def _capacity(self) -> int:
        return self._config.num_workers + self._config.max_queue

    async def _complete(self, request: TextRequest) -> dict[str, Any]:
        try:
            prompt = self._tokenizer.encode(request.text)
        except TokenizerError as error:
            raise InvalidRequestError(str(error), "text") from None
        check_length("text", len(prompt), "max_length", request.max_length, self.context_length)
        return await asyncio.wrap_future(self._runtime.submit(self._run(request, prompt, time.monotonic())))

    async def _run(self, request: TextRequest, prompt: list[int], arrived: float) -> dict[str, Any]:
        self._statistics.began()
        try:
            await self._gate.enter(request.priority)
            waited = time.monotonic() - arrived
            try:
                ended = await self._generate(request, prompt, arrived, waited)
            finally:
                self._gate.leave()
        except EngineError:
            self._statistics.failed()
            raise
        except asyncio.CancelledError:
            self._statistics.cancelled()
            if self._runtime.closed:  # not the caller's doing
                raise CoreUnavailableError("the engine was shut down") from None
            raise
        self._statistics.succeeded(ended)
        return ended.result(self._tokenizer.decode(ended.ids), request.session_id, request.priority)

    async def _generate(
        self, request: TextRequest, prompt: list[int], arrived: float, waited: float
    ) -> Ended:
        client = self._client()
        timeout_s = self._config.request_timeout_s
        generation = client.generate(
            protocol.Generate(
                id=client.next_id(),
                prompt=prompt,
                max_new_tokens=request.max_length,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
                priority=request.priority,
                session_id=request.session_id,
                exact_only=request.exact_only,
                timeout_s=timeout_s,
                stop_ids=list(self._tokenizer.eos_ids),
            )
        )
        timer = self._runtime.loop.call_later(
            timeout_s + GRACE_S,
            functools.partial(
                generation.expire,
                RequestTimeoutError(f"no answer within request_timeout_s of {timeout_s:g} s"),
            ),
        )
        try:
            finished = await generation.result()
        finally:
            timer.cancel()
        raise_unless_complete(finished)
        first = generation.first_token_at
        stages = {**finished.stages}
        stages[Stage.ADMISSION_WAIT] = stages.get(Stage.ADMISSION_WAIT, 0.0) + waited
        return Ended(
            ids=generation.ids,
            finished=msgspec.structs.replace(finished, stages=stages),
            latency_s=time.monotonic() - arrived,
            first_token_s=None if first is None else first - arrived,
        )

    async def _stats(self) -> dict[str, Any]:
        client = self._client()
        sampled = await client.sample()
        front = 0 if self._inproc else await asyncio.to_thread(memory.anonymous_bytes)
        on_gpu = self._described.device.startswith("cuda")
        return self._statistics.report(sampled, front, self._limit_bytes, on_gpu) | {
            "active_requests": client.open_requests + self._gate.waiting,
            "waiting_for_queue": self._gate.waiting,
        }

    def _plain(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Values as JSON has them, a torch dtype for one. What does not fit, the core refuses."""
        try:
            plain = self._config.updated(dict(changes)).model_dump(mode="json")
        except ValidationError:
            return dict(changes)
        return {name: plain[to_snake(name)] for name in changes}

    async def _apply(self, changes: Mapping[str, Any]) -> ApplyReport:
        client = self._client()
        now = await client.describe()
        report = await client.apply(now.epoch, now.generation + 1, self._plain(changes))
        described = await client.describe()
        self._config = KVCacheConfig.model_validate(described.config, context=QUIET)
        self._gate.resize(self._capacity())
        return report
