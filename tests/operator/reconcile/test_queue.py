"""The keyed queue: one reconcile per key at a time, retried on failure, none lost."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from tests.waiting import until

from kvpilot_operator.reconcile import queue as queue_module
from kvpilot_operator.reconcile.queue import KeyedQueue
from kvpilot_operator.status.snapshot import Key

CHAT, CODE = Key("a", "chat"), Key("a", "code")


@dataclass
class Reconciles:
    """Counts reconciles; a test says what each of them does."""

    counts: dict[Key, int] = field(default_factory=lambda: defaultdict(int))
    at_once: dict[Key, int] = field(default_factory=lambda: defaultdict(int))
    period: float | None = None
    failures: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    resyncs: int = 0

    async def reconcile(self, key: Key) -> float | None:
        self.counts[key] += 1
        self.at_once[key] += 1
        assert self.at_once[key] == 1, "two reconciles of one key at once"
        await self.gate.wait()
        self.at_once[key] -= 1
        if self.counts[key] <= self.failures:
            raise RuntimeError("the API server is away")
        return self.period

    async def resync(self) -> None:
        self.resyncs += 1


@pytest.fixture
def reconciles() -> Reconciles:
    made = Reconciles()
    made.gate.set()
    return made


@pytest.fixture
async def queue(reconciles: Reconciles) -> AsyncIterator[KeyedQueue]:
    made = KeyedQueue(reconciles.reconcile, reconciles.resync)
    running = asyncio.create_task(made.run())
    yield made
    await made.stop()
    await asyncio.wait_for(running, 60)


async def test_a_key_is_looked_at_once_per_change(queue: KeyedQueue, reconciles: Reconciles) -> None:
    queue.enqueue(CHAT)
    await until(lambda: reconciles.counts[CHAT] == 1)
    queue.enqueue(CHAT)
    await until(lambda: reconciles.counts[CHAT] == 2)
    assert queue.depth == 0


async def test_a_change_during_a_look_causes_another_one_and_never_two_at_once(
    queue: KeyedQueue, reconciles: Reconciles
) -> None:
    reconciles.gate.clear()
    queue.enqueue(CHAT)
    await until(lambda: reconciles.counts[CHAT] == 1)
    for _ in range(5):
        queue.enqueue(CHAT)
    queue.enqueue(CODE)
    await until(lambda: reconciles.counts[CODE] == 1)
    assert reconciles.counts[CHAT] == 1
    assert queue.depth == 2
    reconciles.gate.set()
    await until(lambda: reconciles.counts[CHAT] == 2)
    await asyncio.sleep(0.02)
    assert reconciles.counts == {CHAT: 2, CODE: 1}


async def test_ticks_go_on_by_themselves_and_fall_together(queue: KeyedQueue, reconciles: Reconciles) -> None:
    reconciles.period = 0.05
    queue.enqueue(CHAT)
    await asyncio.sleep(0.013)
    queue.enqueue(CODE)
    await until(lambda: reconciles.counts[CODE] >= 3)
    # Not at every moment: an instant may pass between the end of the one reconcile and of the other.
    await until(lambda: queue._entries[CHAT].due == queue._entries[CODE].due < math.inf)


async def test_a_failed_look_is_repeated_with_growing_delays(
    queue: KeyedQueue, reconciles: Reconciles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "FIRST_DELAY_S", 0.02)
    reconciles.failures = 3
    started = asyncio.get_running_loop().time()
    queue.enqueue(CHAT)
    await until(lambda: reconciles.counts[CHAT] == 4)
    waited = asyncio.get_running_loop().time() - started
    assert waited >= 0.8 * (0.02 + 0.04 + 0.08)


async def test_look_now_waits_for_the_look_in_progress_and_tells_failures(
    queue: KeyedQueue, reconciles: Reconciles
) -> None:
    reconciles.gate.clear()
    queue.enqueue(CHAT)
    await until(lambda: reconciles.counts[CHAT] == 1)
    now = asyncio.create_task(queue.reconcile_now(CHAT))
    await asyncio.sleep(0.01)
    assert reconciles.counts[CHAT] == 1
    reconciles.gate.set()
    await now
    assert reconciles.counts[CHAT] == 2
    reconciles.failures = 3
    with pytest.raises(RuntimeError, match="the API server is away"):
        await queue.reconcile_now(CHAT)


async def test_everything_is_looked_at_again_from_time_to_time(reconciles: Reconciles) -> None:
    queue = KeyedQueue(reconciles.reconcile, reconciles.resync, resync_s=0.03)
    running = asyncio.create_task(queue.run())
    await until(lambda: reconciles.resyncs >= 3)
    await queue.stop()
    await running


async def test_stop_waits_for_a_look_in_progress_and_begins_none(reconciles: Reconciles) -> None:
    queue = KeyedQueue(reconciles.reconcile, reconciles.resync)
    running = asyncio.create_task(queue.run())
    reconciles.gate.clear()
    queue.enqueue(CHAT)
    await until(lambda: reconciles.counts[CHAT] == 1)
    stopping = asyncio.create_task(queue.stop(grace_s=60))
    queue.enqueue(CODE)
    await asyncio.sleep(0.02)
    assert not stopping.done()
    reconciles.gate.set()
    await asyncio.wait_for(stopping, 60)
    await asyncio.wait_for(running, 60)
    assert reconciles.counts == {CHAT: 1}


async def test_a_look_that_hangs_is_cancelled_after_the_grace(reconciles: Reconciles) -> None:
    queue = KeyedQueue(reconciles.reconcile, reconciles.resync)
    running = asyncio.create_task(queue.run())
    reconciles.gate.clear()
    queue.enqueue(CHAT)
    await until(lambda: reconciles.counts[CHAT] == 1)
    await asyncio.wait_for(queue.stop(grace_s=0.05), 60)
    await asyncio.wait_for(running, 60)
