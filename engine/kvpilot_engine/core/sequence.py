"""One request inside the core: its tokens, its hold on the cache, and where its time went."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import Enum

from kvpilot_engine import protocol
from kvpilot_engine.contract.metrics import Stage
from kvpilot_engine.kvcache import Lease


class Phase(Enum):
    """What the scheduler may do with a sequence next."""

    WAITING = "waiting"  #: holds nothing
    SHORT = "short"  #: holds a worker slot and a lease; waits for the pages that its prompt needs
    LOADING = "loading"  #: has room for its prompt; blocks of a slower tier are on their way
    READY = "ready"  #: has room for its prompt; waits for a row
    RUNNING = "running"  #: holds a row
    ENDED = "ended"


_UNSIGNED = 2**64 - 1


def _random(seed: int | None) -> random.Random:
    """A generator of its own for each seed of 64 bits; ``Random`` itself takes -7 for 7."""
    return random.Random(None if seed is None else seed & _UNSIGNED)


@dataclass(eq=False)
class Sequence:
    """A request and its progress.

    Attributes:
        arrived: time of arrival, s of the core's clock.
        order: arrival number; ties of priority go to the earlier one.
        tokens: prompt, then everything generated. The last generated token's key is not computed yet.
        computed: tokens from the start whose keys and values are in the pool.
        cached_tokens: prompt tokens that the cache served when it first ran.
        blocked_at: leases given back when it lost its pages; it waits for a further one.
        counted: a lease of it was counted: a further one is not a new query of the cache.
        last_step: number of the last step it took part in.
    """

    request: protocol.Generate
    max_new_tokens: int
    arrived: float
    order: int
    tokens: list[int]
    random: random.Random
    phase: Phase = Phase.WAITING
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
    def of(cls, request: protocol.Generate, order: int, now: float, most: int = 0) -> Sequence:
        """A sequence that has just arrived; without a limit of its own it may reach ``most`` tokens."""
        limit = request.max_new_tokens
        return cls(
            request=request,
            max_new_tokens=max(1, most - len(request.prompt)) if limit is None else limit,
            arrived=now,
            order=order,
            tokens=list(request.prompt),
            random=_random(request.seed),
            _stage_since=now,
        )

    @property
    def urgency(self) -> tuple[int, int]:
        """Sort key: most urgent first, then the earliest."""
        return (-self.request.priority, self.order)

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt)

    @property
    def output_tokens(self) -> int:
        """New tokens so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def deadline(self) -> float:
        """When it times out, on the core's clock."""
        return self.arrived + self.request.timeout_s

    @property
    def decoding(self) -> bool:
        """Whether its next step computes one token and yields one."""
        return len(self.tokens) - self.computed == 1 and self.output_tokens > 0

    def start_behind(self, cached: int) -> None:
        """Compute from token ``cached`` on; the pages before it came from the cache."""
        self.computed = cached
        if self.last_step < 0:  # later on, what it finds again is its own
            self.cached_tokens = cached

    def enter(self, stage: Stage, now: float) -> None:
        """Book the time since the last call under the stage that ends now.

        A preempted sequence stays in ``preempted`` until it runs again, whatever it waits for meanwhile.
        """
        if self.stage is Stage.PREEMPTED and stage not in (Stage.PREFILL, Stage.DECODE):
            return
        if stage is not self.stage:
            self._book(now)
            self.stage = stage

    def _book(self, now: float) -> None:
        self._seconds[self.stage] = self._seconds.get(self.stage, 0.0) + now - self._stage_since
        self._stage_since = now

    def finished(self, reason: str, now: float, message: str = "") -> protocol.Finished:
        """The last message of this sequence; its stages add up to ``now - arrived``."""
        self._book(now)
        self.phase = Phase.ENDED
        return protocol.Finished(
            id=self.request.id,
            reason=reason,
            message=message,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            cached_tokens=self.cached_tokens,
            stages={stage.value: seconds for stage, seconds in self._seconds.items()},
            first_token_s=self.first_token_s,
        )
