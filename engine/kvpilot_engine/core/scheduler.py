"""Chooses the sequences of the next step.

waiting --(worker slot)--> waiting_for_pages --(pages)--> loading --(blocks)--> ready --(row)--> running
A running sequence that gets no page preempts the youngest sequence of the lowest priority, which waits again.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from kvpilot_engine.contract import PAGE_TOKENS, KVCacheConfig
from kvpilot_engine.contract.metrics import Stage
from kvpilot_engine.core.sequence import Sequence, SequenceState
from kvpilot_engine.kvcache import KVCache

_SPARE_DEADLINES = 1000

_BY_URGENCY: Callable[[Sequence], tuple[int, int]] = attrgetter("urgency")


@dataclass(frozen=True)
class Scheduled:
    """The part of a sequence in the next step.

    Attributes:
        count: tokens that the step computes.
        decode: the step computes only the token that was generated last.
        samples: the step computes its last token, so that the next one can be sampled.
    """

    sequence: Sequence
    count: int
    decode: bool
    samples: bool


class Scheduler:
    """Queue, worker slots and rows. The limits of ``config`` are read in every step."""

    def __init__(self, cache: KVCache, config: KVCacheConfig) -> None:
        self.config = config
        self.preemptions = 0
        self.waiting: list[Sequence] = []
        self.admitted: list[Sequence] = []  # most urgent first; each holds a lease
        self._cache = cache
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._step = 0
        self._releases = 0  # leases released: only a release gives a preempted sequence more pages

    @property
    def live(self) -> int:
        """Number of sequences that have not ended."""
        return len(self.waiting) + len(self.admitted)

    @property
    def waiting_for_pages(self) -> int:
        """Number of sequences that hold a worker slot and wait for pages."""
        return sum(s.state is SequenceState.WAITING_FOR_PAGES for s in self.admitted)

    @property
    def rows(self) -> int:
        """Rows in use."""
        return sum(s.state is SequenceState.RUNNING for s in self.admitted)

    def reconfigure(self, config: KVCacheConfig) -> None:
        """Take new limits. Counts as a release, because a larger quota provides pages as well."""
        self.config = config
        self._releases += 1

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        insort(self.waiting, sequence, key=_BY_URGENCY)
        heapq.heappush(self._deadlines, (sequence.deadline, sequence.order, sequence))
        if len(self._deadlines) > 2 * self.live + _SPARE_DEADLINES:  # bound the entries of ended sequences
            self._deadlines = [
                entry for entry in self._deadlines if entry[2].state is not SequenceState.ENDED
            ]
            heapq.heapify(self._deadlines)

    def expired(self, now: float) -> list[Sequence]:
        """Return the live sequences past their deadline, each once."""
        found = []
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = heapq.heappop(self._deadlines)[2]
            if sequence.state is not SequenceState.ENDED:
                found.append(sequence)
        return found

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence and release its lease."""
        if sequence.lease is None:
            self.waiting.remove(sequence)
        else:
            self._release(sequence)

    def schedule(self, now: float) -> list[Scheduled]:
        """Plan the next step: decode rows first, then prefill, within ``max_step_tokens``."""
        self._step += 1
        self._finish_loading(now)
        self._admit(now)
        self._assign_rows()
        plan = self._decodes(now)
        plan += self._prefills(self.config.max_step_tokens - len(plan), now)
        plan = [item for item in plan if item.sequence.state is SequenceState.RUNNING]
        for item in plan:
            item.sequence.last_step = self._step
            item.sequence.enter(Stage.DECODE if item.sequence.output_tokens else Stage.PREFILL, now)
        return plan

    def _finish_loading(self, now: float) -> None:
        for sequence in self.admitted:
            if sequence.state is SequenceState.LOADING and sequence.lease and not sequence.lease.loading:
                self._make_ready(sequence, now)

    def _make_ready(self, sequence: Sequence, now: float) -> None:
        sequence.state = SequenceState.READY
        sequence.enter(Stage.BATCH_WAIT, now)

    def _admit(self, now: float) -> None:
        without_pages = [s for s in self.admitted if s.state is SequenceState.WAITING_FOR_PAGES]
        while without_pages and len(self.admitted) > self.config.num_workers:  # the limit was lowered
            self._requeue(without_pages.pop(), now)
        for sequence in without_pages:
            if sequence.state is SequenceState.WAITING_FOR_PAGES and not self._allocate(sequence, now):
                break
        while self.waiting and len(self.admitted) < self.config.num_workers:
            sequence = self.waiting[0]
            if self._blocked_by_urgent(sequence):
                return
            if sequence.blocked_at == self._releases and self.admitted:
                return  # it lost its pages, and no lease was released since
            del self.waiting[0]
            sequence.lease = self._cache.lease(
                sequence.tokens, sequence.hashes, sequence.request.exact_only, count=not sequence.counted
            )
            sequence.state = SequenceState.WAITING_FOR_PAGES
            insort(self.admitted, sequence, key=_BY_URGENCY)
            self._allocate(sequence, now)

    def _blocked_by_urgent(self, newcomer: Sequence) -> bool:
        """True if a more urgent sequence waits for pages: ``newcomer`` must not take them first."""
        return any(
            s.state is SequenceState.WAITING_FOR_PAGES and s.urgency < newcomer.urgency for s in self.admitted
        )

    def _allocate(self, sequence: Sequence, now: float) -> bool:
        """Start to load a sequence's blocks, or make it ready, if there are pages for its whole prompt.

        Less urgent sequences that also wait for pages give up theirs for it; sequences that have all of their
        pages keep them. Returns False if pages are missing.
        """
        lease = sequence.lease
        assert lease is not None
        self._cache.refresh(lease)
        while not self._fits(sequence):
            least_urgent = next(
                s for s in reversed(self.admitted) if s.state is SequenceState.WAITING_FOR_PAGES
            )
            if least_urgent is not sequence:
                self._requeue(least_urgent, now)
            elif len(self.admitted) > 1:
                return False
            else:
                break  # alone: loads that land free pages, or it continues beyond a lowered quota
        self._cache.load(lease)
        if lease.loading:
            sequence.state = SequenceState.LOADING
            sequence.enter(Stage.TIER_LOAD, now)
        else:
            self._make_ready(sequence, now)
        return True

    def _fits(self, newcomer: Sequence) -> bool:
        """True if there are pages for every allocated prompt and this one, and one more for each row."""
        wanted = self.rows
        for sequence in self.admitted:
            if sequence.lease and (
                sequence is newcomer or sequence.state is not SequenceState.WAITING_FOR_PAGES
            ):
                held = len(sequence.lease.pages) + sequence.lease.pending_pages
                wanted += max(0, -(-len(sequence.tokens) // PAGE_TOKENS) - held)
        return self._cache.pages_available >= wanted

    def _assign_rows(self) -> None:
        free = self.config.batch_size - self.rows
        for sequence in self.admitted:
            if free <= 0:
                return
            if sequence.state is SequenceState.READY:
                sequence.state = SequenceState.RUNNING
                free -= 1

    def _prefills(self, budget: int, now: float) -> list[Scheduled]:
        """Chunks of prefill, most urgent first.

        Of several sequences that miss the same page, one computes it and the others wait to share it.
        """
        plan: list[Scheduled] = []
        in_progress: set[bytes] = set()
        for sequence in list(self.admitted):
            if budget <= 0:
                break
            if sequence.state is not SequenceState.RUNNING or sequence.decoding:
                continue
            lease = sequence.lease
            assert lease is not None
            if not lease.computing:
                self._cache.refresh(lease)
                sequence.skip_cached(lease.cached_tokens)
                if lease.hits < lease.usable and lease.hashes.pages[lease.hits] in in_progress:
                    continue
            left = len(sequence.tokens) - sequence.computed
            count = min(budget, left)
            if not self._grow(sequence, sequence.computed + count, now):
                continue
            plan.append(Scheduled(sequence, count, decode=False, samples=count == left))
            budget -= count
            in_progress.update(lease.hashes.pages[sequence.computed // PAGE_TOKENS : lease.usable])
        return plan

    def _decodes(self, now: float) -> list[Scheduled]:
        """Decode rows with a page for their next token; those that waited longest come first."""
        decoding = [s for s in self.admitted if s.state is SequenceState.RUNNING and s.decoding]
        if len(decoding) > self.config.max_step_tokens:
            decoding.sort(key=attrgetter("last_step"))
            del decoding[self.config.max_step_tokens :]
        grown = [
            s for s in decoding if s.state is SequenceState.RUNNING and self._grow(s, len(s.tokens), now)
        ]
        return [Scheduled(s, 1, decode=True, samples=True) for s in grown if s.state is SequenceState.RUNNING]

    def _grow(self, sequence: Sequence, total: int, now: float) -> bool:
        """Hold pages for tokens [0, total), if necessary by preemption.

        Returns False if the sequence itself was preempted, or, when it is alone, waits for loads to land.
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
        """Requeue the youngest sequence of the lowest priority, and return it."""
        victim = self.admitted[-1]
        self._requeue(victim, now)
        return victim

    def _requeue(self, sequence: Sequence, now: float) -> None:
        if sequence.state is SequenceState.RUNNING:
            self.preemptions += 1
            sequence.enter(Stage.PREEMPTED, now)
        else:
            sequence.enter(Stage.ADMISSION_WAIT, now)
        self._release(sequence)
        sequence.state = SequenceState.WAITING
        sequence.computed = 0
        sequence.blocked_at = self._releases
        insort(self.waiting, sequence, key=_BY_URGENCY)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.lease is not None
        sequence.counted = sequence.lease.counted
        self._cache.release(sequence.lease)
        sequence.lease = None
        self._releases += 1
        self.admitted.remove(sequence)
