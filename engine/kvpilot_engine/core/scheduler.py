"""Who runs in the next step.

waiting --(worker slot)--> short --(pages)--> loading --(blocks landed)--> ready --(row)--> running --> ended.
A running sequence that finds no page sends the youngest of the lowest priority back to waiting.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from kvpilot_engine.contract import PAGE_TOKENS, KVCacheConfig
from kvpilot_engine.contract.metrics import Stage
from kvpilot_engine.kvcache import KVCache
from kvpilot_engine.sequence import Phase, Sequence

_SPARE_DEADLINES = 1000

_BY_URGENCY: Callable[[Sequence], tuple[int, int]] = attrgetter("urgency")


@dataclass(frozen=True)
class Scheduled:
    """A sequence's part in the next step.

    Attributes:
        count: tokens of it that the step computes.
        decode: it computes the token generated last, nothing else.
        samples: the step reaches its last token, so that the next one can be chosen.
    """

    sequence: Sequence
    count: int
    decode: bool
    samples: bool


class Scheduler:
    """Queues, worker slots and rows. The limits are read from ``config`` at every step."""

    def __init__(self, cache: KVCache, config: KVCacheConfig) -> None:
        self.config = config
        self.preemptions = 0
        self.waiting: list[Sequence] = []
        self.admitted: list[Sequence] = []  # most urgent first; every one holds a lease
        self._cache = cache
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._step = 0
        self._releases = 0  # leases given back: only then can a preempted sequence find more pages

    @property
    def live(self) -> int:
        """Sequences that have not ended."""
        return len(self.waiting) + len(self.admitted)

    @property
    def short(self) -> int:
        """Sequences with a worker slot that wait for pages."""
        return sum(s.phase is Phase.SHORT for s in self.admitted)

    @property
    def rows(self) -> int:
        """Rows in use."""
        return sum(s.phase is Phase.RUNNING for s in self.admitted)

    def reconfigure(self, config: KVCacheConfig) -> None:
        """Take new limits; pages of a larger quota are as good as those that a lease gives back."""
        self.config = config
        self._releases += 1

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        insort(self.waiting, sequence, key=_BY_URGENCY)
        heapq.heappush(self._deadlines, (sequence.deadline, sequence.order, sequence))
        if len(self._deadlines) > 2 * self.live + _SPARE_DEADLINES:  # ended ones must not pile up till theirs
            self._deadlines = [entry for entry in self._deadlines if entry[2].phase is not Phase.ENDED]
            heapq.heapify(self._deadlines)

    def expired(self, now: float) -> list[Sequence]:
        """Live sequences past their deadline; each is returned once."""
        found = []
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = heapq.heappop(self._deadlines)[2]
            if sequence.phase is not Phase.ENDED:
                found.append(sequence)
        return found

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out and let go of what it holds."""
        if sequence.lease is None:
            self.waiting.remove(sequence)
        else:
            self._let_go(sequence)

    def schedule(self, now: float) -> list[Scheduled]:
        """The next step: decode rows first, then prefill, within ``max_step_tokens``."""
        self._step += 1
        self._land_loads(now)
        self._admit(now)
        self._give_rows()
        plan = self._decodes(now)
        plan += self._prefills(self.config.max_step_tokens - len(plan), now)
        plan = [item for item in plan if item.sequence.phase is Phase.RUNNING]
        for item in plan:
            item.sequence.last_step = self._step
            item.sequence.enter(Stage.DECODE if item.sequence.output_tokens else Stage.PREFILL, now)
        return plan

    def _land_loads(self, now: float) -> None:
        for sequence in self.admitted:
            if sequence.phase is Phase.LOADING and sequence.lease and not sequence.lease.loading:
                self._ready(sequence, now)

    def _ready(self, sequence: Sequence, now: float) -> None:
        sequence.phase = Phase.READY
        sequence.enter(Stage.BATCH_WAIT, now)

    def _admit(self, now: float) -> None:
        short = [s for s in self.admitted if s.phase is Phase.SHORT]
        while short and len(self.admitted) > self.config.num_workers:  # lowered since
            self._send_back(short.pop(), now)
        for sequence in short:
            if sequence.phase is Phase.SHORT and not self._find_room(sequence, now):
                break
        while self.waiting and len(self.admitted) < self.config.num_workers:
            sequence = self.waiting[0]
            if self._would_overtake(sequence):
                return
            if sequence.blocked_at == self._releases and self.admitted:
                return  # it lost its pages, and none has come free since
            del self.waiting[0]
            request = sequence.request
            sequence.lease = self._cache.lease(
                sequence.tokens, request.salt, request.exact_only, count=not sequence.counted
            )
            sequence.phase = Phase.SHORT
            insort(self.admitted, sequence, key=_BY_URGENCY)
            self._find_room(sequence, now)

    def _would_overtake(self, newcomer: Sequence) -> bool:
        """Whether a more urgent sequence waits for pages, which ``newcomer`` must not take before it."""
        return any(s.phase is Phase.SHORT and s.urgency < newcomer.urgency for s in self.admitted)

    def _find_room(self, sequence: Sequence, now: float) -> bool:
        """Let a short sequence go on, and its blocks be loaded, once pages suffice for its whole prompt.

        Nobody who got that far is disturbed for it; those that are less urgent and short give way.
        """
        lease = sequence.lease
        assert lease is not None
        self._cache.relook(lease)
        while not self._room_for(sequence):
            last = next(s for s in reversed(self.admitted) if s.phase is Phase.SHORT)
            if last is not sequence:
                self._send_back(last, now)
            elif len(self.admitted) > 1:
                return False
            else:
                break  # alone: pages come free as loads land, or go beyond a quota lowered since
        self._cache.load(lease)
        if lease.loading:
            sequence.phase = Phase.LOADING
            sequence.enter(Stage.TIER_LOAD, now)
        else:
            self._ready(sequence, now)
        return True

    def _room_for(self, newcomer: Sequence) -> bool:
        """Whether pages suffice for all prompts under way and this one, with one more for each row."""
        wanted = self.rows
        for sequence in self.admitted:
            if sequence.lease and (sequence is newcomer or sequence.phase is not Phase.SHORT):
                held = len(sequence.lease.pages) + sequence.lease.coming
                wanted += max(0, -(-len(sequence.tokens) // PAGE_TOKENS) - held)
        return self._cache.pages_available >= wanted

    def _give_rows(self) -> None:
        free = self.config.batch_size - self.rows
        for sequence in self.admitted:
            if free <= 0:
                return
            if sequence.phase is Phase.READY:
                sequence.phase = Phase.RUNNING
                free -= 1

    def _prefills(self, budget: int, now: float) -> list[Scheduled]:
        """Chunks of prefill, most urgent first.

        Of several sequences that miss the same page, one computes it and the others wait to take it over.
        """
        plan: list[Scheduled] = []
        underway: set[bytes] = set()
        for sequence in list(self.admitted):
            if budget <= 0:
                break
            if sequence.phase is not Phase.RUNNING or sequence.decoding:
                continue
            lease = sequence.lease
            assert lease is not None
            if not lease.computing:
                self._cache.relook(lease)
                sequence.start_behind(lease.cached_tokens)
                if lease.hits < lease.usable and lease.hashes[lease.hits] in underway:
                    continue
            left = len(sequence.tokens) - sequence.computed
            count = min(budget, left)
            if not self._grow(sequence, sequence.computed + count, now):
                continue
            plan.append(Scheduled(sequence, count, decode=False, samples=count == left))
            budget -= count
            underway.update(lease.hashes[sequence.computed // PAGE_TOKENS : lease.usable])
        return plan

    def _decodes(self, now: float) -> list[Scheduled]:
        """Decode rows with a page for their next token, those that waited longest first."""
        decoding = [s for s in self.admitted if s.phase is Phase.RUNNING and s.decoding]
        if len(decoding) > self.config.max_step_tokens:
            decoding.sort(key=attrgetter("last_step"))
            del decoding[self.config.max_step_tokens :]
        grown = [s for s in decoding if s.phase is Phase.RUNNING and self._grow(s, len(s.tokens), now)]
        return [Scheduled(s, 1, decode=True, samples=True) for s in grown if s.phase is Phase.RUNNING]

    def _grow(self, sequence: Sequence, total: int, now: float) -> bool:
        """Pages for tokens [0, total), if need be by preemption, of itself when it is the youngest.

        False when it has none: it was preempted, or, being alone, waits for blocks on their way to land.
        """
        lease = sequence.lease
        assert lease is not None
        while len(lease.pages) * PAGE_TOKENS < total:
            if self._cache.extend(lease, total):
                return True
            if len(self.admitted) == 1 or self._preempt(now) is sequence:
                return False
        return True

    def _preempt(self, now: float) -> Sequence:
        """Send the youngest of the lowest priority back to waiting."""
        victim = self.admitted[-1]
        self._send_back(victim, now)
        return victim

    def _send_back(self, sequence: Sequence, now: float) -> None:
        if sequence.phase is Phase.RUNNING:
            self.preemptions += 1
            sequence.enter(Stage.PREEMPTED, now)
        else:
            sequence.enter(Stage.ADMISSION_WAIT, now)
        self._let_go(sequence)
        sequence.phase = Phase.WAITING
        sequence.computed = 0
        sequence.blocked_at = self._releases
        insort(self.waiting, sequence, key=_BY_URGENCY)

    def _let_go(self, sequence: Sequence) -> None:
        assert sequence.lease is not None
        sequence.counted = sequence.lease.counted
        self._cache.release(sequence.lease)
        sequence.lease = None
        self._releases += 1
        self.admitted.remove(sequence)
