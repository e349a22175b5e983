"""Random use of a small cache: whatever happens, it stays whole and says the truth about its pages."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.metrics import total
from kvpilot_engine.kvcache import Fidelity, PrefixHashes

LOSSY_ERROR = 0.6  # more than half a step of 4 bits over the range of a group of normal values


class Running:
    """A sequence as an engine would keep it."""

    def __init__(self, tokens: list[int], salt: str, exact_only: bool, hashes: PrefixHashes) -> None:
        self.tokens = tokens
        self.salt = salt
        self.exact_only = exact_only
        self.hashes = hashes
        self.lease: Any = None
        self.computed = 0


changes = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.sampled_from([128, 256, 512, 768]),
        "host_memory_mb": st.sampled_from([0, 1, 4]),
        "cache_strategy": st.sampled_from(["lru", "lfu", "fifo", "adaptive"]),
        "use_compression": st.booleans(),
        "compression_ratio": st.sampled_from([0.3, 0.52, 1.0]),
        "enable_prefetch": st.booleans(),
        "prefetch_size": st.sampled_from([0, 1, 3]),
    },
)
MAX_LIVE = 3
START = {"max_tokens": 512, "host_memory_mb": 4, "use_compression": True, "enable_prefetch": True}
prompts = st.builds(
    lambda trunk, shared, branch, own: (trunk, shared, branch, own),
    trunk=st.integers(0, 1),
    shared=st.sampled_from([0, 16, 128, 128, 130]),
    branch=st.integers(0, 1),
    own=st.sampled_from([1, 32, 150]),
)


def machine(harness_class: type) -> type[RuleBasedStateMachine]:
    class CacheMachine(RuleBasedStateMachine):
        running = Bundle("running")

        @initialize(values=changes)
        def build(self, values: dict[str, Any]) -> None:
            self.h = harness_class(**{**START, **values})
            self.live: list[Running] = []

        def tokens(self, which) -> list[int]:
            trunk, shared, branch, own = which
            return self.h.prompt(trunk, shared) + self.h.prompt(10 + branch, own)

        @rule(
            target=running,
            which=prompts,
            salt=st.sampled_from(["", "", "", "tenant"]),
            exact_only=st.booleans(),
            ahead=st.booleans(),
        )
        def arrive(self, which, salt, exact_only, ahead):
            sequence = Running(self.tokens(which), salt, exact_only, self.h.cache.hashes(salt))
            if ahead:
                self.h.cache.prefetch(sequence.tokens, sequence.hashes, exact_only)
            sequence.lease = self.h.cache.lease(sequence.tokens, sequence.hashes, exact_only)
            self.h.cache.load(sequence.lease)
            self.live.append(sequence)
            if len(self.live) > MAX_LIVE:
                self.h.cache.release(self.live.pop(0).lease)
            return sequence

        @rule(which=prompts, exact_only=st.booleans(), others=st.lists(st.integers(20, 25), max_size=3))
        def pass_through(self, which, exact_only, others):
            """Whole requests, so that pages come, go to the host tier and come back."""
            for tokens in (self.tokens(which), *(self.h.prompt(seed, 140) for seed in others)):
                if self.h.cache.pages_available * 16 >= len(tokens) + 16:
                    self.h.serve(tokens, exact_only=exact_only)
                    self.h.flush()

        @rule(seed=st.integers(30, 40))
        def wash(self, seed):
            """Fill every page that nobody holds with something else."""
            if self.h.cache.pages_available:
                self.h.serve(self.h.prompt(seed, 16 * min(self.h.cache.pages_available, 32)))
                self.h.flush()

        @rule(sequence=running, chunk=st.sampled_from([1, 16, 40, 200]))
        def compute(self, sequence, chunk):
            lease, cache = sequence.lease, self.h.cache
            if lease.released:
                return
            if not sequence.computed:
                self.h.loaded(lease)
                cache.refresh(lease)
                sequence.computed = lease.cached_tokens
            end = min(len(sequence.tokens), sequence.computed + chunk)
            if end == sequence.computed:  # the prompt is done: generate
                sequence.tokens.append(7)
                end += 1
            if not cache.extend(lease, end):
                assert cache.pages_available < -(-end // 16) - len(lease.pages)
                return
            self.h.write(lease, sequence.tokens, sequence.computed // 16, end // 16, sequence.salt)
            sequence.computed = end
            cache.commit(lease, sequence.tokens, end)

        @rule(sequence=consumes(running))
        def leave(self, sequence):
            self.h.cache.release(sequence.lease)
            self.live = [other for other in self.live if other is not sequence]

        @rule(sequence=consumes(running), target=running)
        def preempt(self, sequence):
            if sequence.lease.released:
                return multiple()
            self.h.cache.release(sequence.lease)
            sequence.lease = self.h.cache.lease(
                sequence.tokens, sequence.hashes, sequence.exact_only, count=False
            )
            sequence.computed = 0
            return multiple(sequence)

        @rule(values=changes)
        def apply(self, values):
            _, lost = self.h.apply(**values)
            assert lost == 0

        @rule(sequence=running)
        def load(self, sequence):
            if not sequence.computed and not sequence.lease.released:
                self.h.cache.load(sequence.lease)

        @rule(blocking=st.booleans())
        def poll(self, blocking):
            if blocking:
                self.h.cache.wait(5)
            self.h.cache.poll()

        @invariant()
        def whole(self):
            self.h.cache.check_integrity()

        @invariant()
        def truthful(self):
            for sequence in self.live:
                lease = sequence.lease
                error = self.h.error(lease, sequence.tokens, sequence.salt)
                if lease.fidelity is Fidelity.EXACT:
                    assert error == 0.0
                assert error < LOSSY_ERROR
                assert not (sequence.exact_only and lease.fidelity)
                assert lease.cached_tokens < len(sequence.tokens)

        @invariant()
        def counted(self):
            values = self.h.cache.counters()
            hits = total(values, names.HIT_TOKENS_TOTAL)
            ceiling = total(values, names.CEILING_TOKENS_TOTAL)
            assert hits <= ceiling <= total(values, names.QUERY_TOKENS_TOTAL)

        def teardown(self):
            if not hasattr(self, "h"):
                return
            for sequence in self.live:
                self.h.cache.release(sequence.lease)
            self.h.until(lambda: not self.h.cache.converging and not self.h.cache._transfer._loads)
            self.h.cache.check_integrity()
            assert self.h.cache.pages_available == self.h.cache.pages_limit
            self.h.cache.close()

    return CacheMachine


def test_random_use_keeps_the_cache_consistent(harness_class):
    run_state_machine_as_test(
        machine(harness_class),
        settings=settings(max_examples=25, stateful_step_count=40),
    )
