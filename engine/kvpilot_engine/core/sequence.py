"""One request inside the core: its tokens, its lease on the cache, and the time that each stage took."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import Enum

from kvpilot_engine.contract.metrics import Stage
from kvpilot_engine.ipc import messages
from kvpilot_engine.kvcache import Lease, PrefixHashes


class SequenceState(Enum):
    """What a sequence waits for, and what it holds."""

    WAITING = "waiting"  #: holds nothing
    WAITING_FOR_PAGES = "waiting_for_pages"  #: holds a worker slot and a lease; its prompt needs more pages
    LOADING = "loading"  #: has pages for its prompt; blocks of a tier are being loaded
    READY = "ready"  #: has pages for its prompt; waits for a row
    RUNNING = "running"  #: holds a row
    ENDED = "ended"


_SEED_MASK = 2**64 - 1


def _random(seed: int | None) -> random.Random:
    """A generator that differs for each 64-bit seed: ``Random`` alone takes -7 as 7."""
    return random.Random(None if seed is None else seed & _SEED_MASK)


@dataclass(eq=False)
class Sequence:
    """A request and its progress.

    Attributes:
        hashes: of its whole pages; every lease of it uses them.
        arrived: time of arrival, s of the core's clock.
        order: arrival number; breaks ties of priority.
        tokens: prompt, then the generated tokens. K and V of the last generated token are not computed yet.
        computed: tokens from the start whose K and V are in the pool.
        cached_tokens: prompt tokens that the cache served when it first ran.
        blocked_at: number of released leases when it lost its pages; it waits until that number grows.
        counted: its lookup is in the cache's counters; a further lease is no new query.
        last_step: number of the last step that included it; -1 before the first.
    """

    request: messages.Generate
    hashes: PrefixHashes
    max_new_tokens: int
    arrived: float
    order: int
    tokens: list[int]
    random: random.Random
    state: SequenceState = SequenceState.WAITING
    lease: Lease | None = None
    computed: int = 0
    cached_tokens: int = 0
    blocked_at: int = -1
    counted: bool = False
    last_step: int = -1
    first_token_s: float | None = None
    stage: Stage = Stage.ADMISSION_WAIT
    _stage_since: float = 0.0
    _seconds: dict[Stage, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, request: messages.Generate, hashes: PrefixHashes, order: int, now: float, max_tokens: int = 0
    ) -> Sequence:
        """A sequence that has just arrived; a request without its own limit may reach ``max_tokens``."""
        limit = request.max_new_tokens
        return cls(
            request=request,
            hashes=hashes,
            max_new_tokens=max(1, max_tokens - len(request.prompt)) if limit is None else limit,
            arrived=now,
            order=order,
            tokens=list(request.prompt),
            random=_random(request.seed),
            _stage_since=now,
        )

    @property
    def urgency(self) -> tuple[int, int]:
        """Sort key: highest priority first, then the earliest arrival."""
        return (-self.request.priority, self.order)

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt, tokens."""
        return len(self.request.prompt)

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def deadline(self) -> float:
        """Time at which it times out, s of the core's clock."""
        return self.arrived + self.request.timeout_s

    @property
    def decoding(self) -> bool:
        """True if its next step computes one token and generates one."""
        return len(self.tokens) - self.computed == 1 and self.output_tokens > 0

    def skip_cached(self, cached: int) -> None:
        """Start to compute at token ``cached``; the cache served the tokens before it."""
        self.computed = cached
        if self.last_step < 0:  # after a preemption the hits are its own pages
            self.cached_tokens = cached

    def enter(self, stage: Stage, now: float) -> None:
        """Add the time since the last call to the stage that ends now.

        A preempted sequence stays in ``preempted`` until it runs again.
        """
        if self.stage is Stage.PREEMPTED and stage not in (Stage.PREFILL, Stage.DECODE):
            return
        if stage is not self.stage:
            self._book(now)
            self.stage = stage

    def _book(self, now: float) -> None:
        self._seconds[self.stage] = self._seconds.get(self.stage, 0.0) + now - self._stage_since
        self._stage_since = now

    def finished(self, reason: str, now: float, message: str = "") -> messages.Finished:
        """End the sequence and return its last message; its stages add up to ``now - arrived``."""
        self._book(now)
        self.state = SequenceState.ENDED
        return messages.Finished(
            id=self.request.id,
            reason=reason,
            message=message,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            cached_tokens=self.cached_tokens,
            stages={stage.value: seconds for stage, seconds in self._seconds.items()},
            first_token_s=self.first_token_s,
        )
