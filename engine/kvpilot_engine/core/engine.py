"""The engine: requests in, tokens out, one step at a time.

Single-threaded: the thread that steps calls every method. Life of a request: ``submit`` queues a Sequence; in
each ``step`` the Scheduler plans the rows, the ModelRunner computes them over the KVCache, and the
postprocessing samples, commits whole pages to the cache and sends tokens; ``Finished`` is its last message.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows

import torch
from pydantic import ValidationError
from pydantic.alias_generators import to_camel, to_snake

from kvpilot_engine import memory
from kvpilot_engine.contract import PAGE_TOKENS, KVCacheConfig, config_errors
from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.config import COLD_FIELDS
from kvpilot_engine.contract.metrics import Stage
from kvpilot_engine.contract.wording import counted
from kvpilot_engine.core.recent_max import RecentMax
from kvpilot_engine.core.sampling import sample
from kvpilot_engine.core.scheduler import Scheduled, Scheduler
from kvpilot_engine.core.sequence import Sequence, SequenceState
from kvpilot_engine.core.step_meter import StepMeter
from kvpilot_engine.ipc import messages
from kvpilot_engine.kvcache import KVCache, KVLayout
from kvpilot_engine.model.determinism import make_deterministic, self_check
from kvpilot_engine.model.loading import LoadedModel, load_model
from kvpilot_engine.model.runner import ModelRunner, Work, measure_decode

LogitsObserver = Callable[[str, int, torch.Tensor], None]
"""Called with request id, position of the token being chosen, and its logits [vocabulary]."""

_LOAD_WAIT_S = 0.005
_DAY_S = 86_400.0


class Engine:
    """Serves one model from one paged cache.

    Args:
        config: of the cache and the scheduler.
        model: ``builtin/tiny-llama``, ``builtin/tiny-qwen3`` or a local directory.
        revision: of the weights; pages are shared within one revision only.
        clock: monotonic, s.
        on_logits: observer of every sampled row.
        on_cache: observer of lookups and insertions, see :class:`~kvpilot_engine.kvcache.KVCache`.

    Raises:
        ModelError: the model cannot be served.
        NotDeterministicError: this CPU cannot provide ``deterministic``.
        ValueError: the cache cannot be built.
    """

    def __init__(
        self,
        config: KVCacheConfig,
        model: str = "builtin/tiny-llama",
        revision: str = "",
        clock: Callable[[], float] = time.monotonic,
        *,
        on_logits: LogitsObserver | None = None,
        on_cache: Callable[..., None] | None = None,
    ) -> None:
        self.config = config
        self.generation = 0
        self.epoch = 0
        self._clock = clock
        self._on_logits = on_logits
        self._instance = uuid.uuid4().hex
        self._model: LoadedModel = load_model(model, config, revision)
        if config.deterministic:
            make_deterministic(self._model.module)
        self._runner = ModelRunner(self._model, config.deterministic)
        if config.deterministic:
            self_check(self._runner)
        layout = KVLayout(
            layers=self._model.layers,
            kv_heads=self._model.kv_heads,
            head_dim=self._model.head_dim,
            dtype=self._model.dtype,
            device=self._model.device,
        )
        self.cache = KVCache(layout, config, self._model.root, clock, observer=on_cache)
        self._scheduler = Scheduler(self.cache, config)
        self.meter = StepMeter()
        self._longest = RecentMax(_DAY_S)
        for rows, seconds in measure_decode(self._runner).items():
            self.meter.calibrate(rows, seconds)
        self._live: dict[str, Sequence] = {}
        self._outbox: list[messages.Tokens | messages.Finished] = []
        self._arrivals = 0
        self._output_tokens = 0

    @property
    def has_work(self) -> bool:
        """True if a step would do work."""
        return bool(self._outbox or self._live or self.cache.converging)

    @property
    def context_length(self) -> int:
        """Largest prompt + answer of the model, tokens."""
        return self._model.context_length

    def submit(self, request: messages.Generate) -> None:
        """Queue a request. A wrong one ends as ``invalid`` or ``too_large`` in the next step."""
        self._arrivals += 1
        max_tokens = min(self._model.context_length, self.cache.max_request_tokens)
        hashes = self.cache.hashes(request.salt)
        sequence = Sequence.of(request, hashes, self._arrivals, self._clock(), max_tokens)
        if error := self._error(request, sequence.max_new_tokens):
            self._outbox.append(sequence.finished("invalid", self._clock(), error))
            return
        self._longest.add(len(request.prompt) + sequence.max_new_tokens, self._clock())
        if error := self._excess(request, sequence.max_new_tokens):
            self._outbox.append(sequence.finished("too_large", self._clock(), error))
            return
        self._live[request.id] = sequence
        self._scheduler.add(sequence)
        self.cache.prefetch(sequence.tokens, hashes, request.exact_only)

    def _error(self, request: messages.Generate, new_tokens: int) -> str | None:
        """The first fault of a request as one line; None if it is valid."""
        total = len(request.prompt) + new_tokens
        vocabulary = int(self._model.module.config.vocab_size)
        size = f"prompt of {counted(len(request.prompt), 'token')} and {new_tokens} new ones"
        wrong_id = next((token for token in request.prompt if not 0 <= token < vocabulary), None)
        checks = (
            (not request.prompt, "prompt: is empty; at least one token is needed"),
            (
                new_tokens < 1,
                f"max_new_tokens: must be at least 1, got {new_tokens}",
            ),
            (request.temperature < 0.0, f"temperature: must be at least 0, got {request.temperature}"),
            (not 0.0 < request.top_p <= 1.0, f"top_p: must be above 0 and at most 1, got {request.top_p}"),
            (request.timeout_s <= 0.0, f"timeout_s: must be above 0, got {request.timeout_s}"),
            (request.id in self._live, f"id: {request.id!r} is already in use"),
            (wrong_id is not None, f"prompt: token ids must be 0 to {vocabulary - 1}, got {wrong_id}"),
            (
                total > self._model.context_length,
                f"{size} make {total}; the model's context length is {self._model.context_length}",
            ),
        )
        return next((message for wrong, message in checks if wrong), None)

    def _excess(self, request: messages.Generate, new_tokens: int) -> str | None:
        """By what a request exceeds the quota of the cache, as one line; None if it fits."""
        total, held = len(request.prompt) + new_tokens, self.cache.max_request_tokens
        if total <= held:
            return None
        bound = "max_tokens" if held + PAGE_TOKENS > self.config.max_tokens else "max_memory_mb"
        size = f"prompt of {counted(len(request.prompt), 'token')} and {new_tokens} new ones"
        return f"{size} make {total}; the cache holds {held} (the engine's {bound})"

    def abort(self, request_id: str) -> None:
        """End a request as ``cancelled`` and release its pages; an unknown id is ignored."""
        if sequence := self._live.get(request_id):
            self._end(sequence, "cancelled", self._clock(), "the client disconnected")

    def step(self) -> list[messages.Tokens | messages.Finished]:
        """Schedule, run, postprocess. Returns the messages, in order for each request; [] when idle."""
        began = self._clock()
        for sequence in self._scheduler.expired(began):
            message = f"timed out after {sequence.request.timeout_s:g} s"
            self._end(sequence, "timeout", began, message)
        self.cache.poll()
        plan = self._scheduler.schedule(began)
        if plan:
            works = [_work(item) for item in plan]
            self._postprocess(plan, self._runner.run(works, self.cache.k, self.cache.v))
            prefills = sum(not item.decode for item in plan)
            self.meter.record(len(plan), prefills, self._clock() - began)
        elif not self._outbox:
            # With nothing to run, every sequence waits for a load: block until one lands instead of spinning.
            # Without a load this returns at once.
            self.cache.wait(_LOAD_WAIT_S)
        out, self._outbox = self._outbox, []
        return out

    def _postprocess(self, plan: Rows[Scheduled], logits: torch.Tensor) -> None:
        sampled = [item.sequence for item in plan if item.samples]
        tokens = sample(logits, sampled)
        now = self._clock()
        for item in plan:
            sequence = item.sequence
            sequence.computed += item.count
            assert sequence.lease is not None
            self.cache.commit(sequence.lease, sequence.tokens, sequence.computed)
        for row, (sequence, token) in enumerate(zip(sampled, tokens, strict=True)):
            if self._on_logits is not None:
                self._on_logits(sequence.request.id, len(sequence.tokens), logits[row])
            self._append(sequence, token, now)

    def _append(self, sequence: Sequence, token: int, now: float) -> None:
        if token in sequence.request.stop_ids:
            self._end(sequence, "stop", now)
            return
        sequence.tokens.append(token)
        self._output_tokens += 1
        self._outbox.append(messages.Tokens(sequence.request.id, [token]))
        if sequence.first_token_s is None:
            sequence.first_token_s = now - sequence.arrived
            sequence.enter(Stage.DECODE, now)
        if sequence.output_tokens >= sequence.max_new_tokens:
            self._end(sequence, "length", now)

    def _end(self, sequence: Sequence, reason: str, now: float, message: str = "") -> None:
        self._scheduler.remove(sequence)
        del self._live[sequence.request.id]
        self._outbox.append(sequence.finished(reason, now, message))

    def apply(self, change: messages.Apply) -> messages.Applied | messages.Refused:
        """Change hot fields between two steps, all of them or none."""
        if change.epoch < self.epoch:
            return messages.Refused(
                change.id, "stale_epoch", f"epoch: {change.epoch} is behind the engine's {self.epoch}"
            )
        try:
            new = self.config.updated(change.values)
        except ValidationError as error:
            return messages.Refused(change.id, "invalid", _as_spelled(config_errors(error), change.values))
        changed = self.config.difference(new)
        if cold := sorted(COLD_FIELDS & changed.keys()):
            now = self.config.model_dump(mode="json")
            lines = [f"{f}: needs a restart, is {now[f]!r}, got {changed[f]!r}" for f in cold]
            return messages.Refused(change.id, "cold", _as_spelled(lines, change.values))
        try:
            kept, lost = self.cache.apply(new)
        except ValueError as error:  # above the reservation made at the start
            return messages.Refused(change.id, "cold", _as_spelled([str(error)], change.values))
        self.config = new
        self._scheduler.reconfigure(new)
        self.generation, self.epoch = change.generation, change.epoch
        return messages.Applied(
            id=change.id,
            generation=self.generation,
            epoch=self.epoch,
            changed=sorted(to_camel(name) for name in changed),
            blocks_kept=kept,
            blocks_lost=lost,
            converging=self._converging,
        )

    @property
    def _converging(self) -> bool:
        """True until every lowered limit is reached: quotas of the cache, worker slots and rows."""
        over_slots = len(self._scheduler.admitted) > self.config.num_workers
        return self.cache.converging or over_slots or self._scheduler.rows > self.config.batch_size

    def describe(self, id: str) -> messages.Described:  # noqa: A002  (as the message spells it)
        """The live configuration, generation and epoch."""
        return messages.Described(
            id=id,
            instance=self._instance,
            model=self._model.name,
            device=self._model.device.type,
            context_length=self._model.context_length,
            generation=self.generation,
            epoch=self.epoch,
            config=self.config.model_dump(mode="json", by_alias=True, exclude_unset=True),
            converging=self._converging,
            ceilings=self.cache.ceilings(),
        )

    def sample(self, id: str) -> messages.Sampled:  # noqa: A002
        """Counters and gauges of the core; the frontend has those of HTTP."""
        meter, scheduler = self.meter, self._scheduler
        waiting_for_pages = scheduler.waiting_for_pages
        counters: dict[str, Mapping[str, float]] = {
            names.STEPS_TOTAL: {"": meter.steps},
            names.STEP_BUSY_SECONDS_TOTAL: {"": meter.busy_s},
            names.STEP_ROWS_TOTAL: {"": meter.rows_sum},
            names.BUCKET_ROWS_TOTAL: {str(bucket): rows for bucket, rows in meter.bucket_rows.items()},
            names.BUCKET_SECONDS_TOTAL: {str(bucket): spent for bucket, spent in meter.bucket_s.items()},
            names.PREEMPTIONS_TOTAL: {"": scheduler.preemptions},
            names.OUTPUT_TOKENS_TOTAL: {"": self._output_tokens},
            **self.cache.counters(),
        }
        gauges: dict[str, Mapping[str, float]] = {
            names.STEP_MARGINAL_GAIN: {"": meter.marginal_gain()},
            names.REQUESTS_WAITING: {"": len(scheduler.waiting) + waiting_for_pages},
            names.REQUESTS_RUNNING: {"": len(scheduler.admitted) - waiting_for_pages},
            names.CONFIG_GENERATION: {"": self.generation},
            names.CONFIG_CONVERGING: {"": int(self._converging)},
            names.LONGEST_REQUEST_TOKENS: {"": self._longest.value(self._clock())},
            names.STEP_CURVE_SECONDS: {str(rows): seconds for rows, seconds in meter.curve.items()},
            **self.cache.gauges(),
        }
        device_bytes, device_limit = self._device_bytes()
        return messages.Sampled(
            id=id,
            counters=counters,
            gauges=gauges,
            host_bytes=max(0, memory.anonymous_bytes() - self.cache.free_slab_bytes),
            device_bytes=device_bytes,
            device_limit_bytes=device_limit,
        )

    def _device_bytes(self) -> tuple[int, int]:
        """Device memory outside the cache plus the cache's budget, and the device's total; 0, 0 on a CPU."""
        if self._model.device.type != "cuda":
            return 0, 0
        slab = self.cache.k.nbytes + self.cache.v.nbytes
        outside = torch.cuda.memory_reserved(self._model.device) - slab
        total = torch.cuda.get_device_properties(self._model.device).total_memory
        return outside + self.cache.budgeted_bytes, total

    def check_integrity(self) -> None:
        """Raise AssertionError, with the record that differs, if queues, leases and cache disagree."""
        self.cache.check_integrity()
        scheduler = self._scheduler
        queued = {*scheduler.waiting, *scheduler.admitted}
        assert queued == set(self._live.values()), "the queued requests are not the live ones"
        assert len(queued) == scheduler.live, "a request is queued twice"
        for sequence in scheduler.waiting:
            assert sequence.state is SequenceState.WAITING, (
                f"{sequence.request.id} is queued as {sequence.state}"
            )
            assert sequence.lease is None, f"{sequence.request.id} is queued and holds a lease"
        for sequence in scheduler.admitted:
            assert sequence.lease is not None, f"{sequence.request.id} is admitted without a lease"

    def close(self) -> None:
        """End the cache's background work and free the pool."""
        self.cache.close()


def _as_spelled(lines: list[str], values: Mapping[str, object]) -> str:
    """Errors in one line, each field in the spelling of the caller, snake_case or camelCase."""
    given = {to_snake(name): name for name in values}
    parts = (line.partition(":") for line in lines)
    return "; ".join(f"{given.get(field, field)}{colon}{rest}" for field, colon, rest in parts)


def _work(item: Scheduled) -> Work:
    sequence = item.sequence
    assert sequence.lease is not None
    begin = sequence.computed
    return Work(sequence.tokens[begin : begin + item.count], begin, sequence.lease.pages, item.samples)
