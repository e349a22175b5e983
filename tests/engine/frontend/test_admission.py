"""The admission queue: bounded entry, order by priority, cancellation, resizing and closing."""

from __future__ import annotations

import asyncio

import pytest

from kvpilot_engine.frontend.admission import AdmissionQueue


async def test_waiters_are_admitted_by_priority_then_by_arrival() -> None:
    queue, order = AdmissionQueue(1), []

    async def pass_through(name: str, priority: int) -> None:
        await queue.wait(priority)
        order.append(name)
        await asyncio.sleep(0)
        queue.leave()

    assert queue.enter()
    tasks = [asyncio.create_task(pass_through(*who)) for who in (("a", 0), ("b", 0), ("c", 5), ("d", -1))]
    await asyncio.sleep(0)
    assert queue.waiting == 4
    queue.leave()
    await asyncio.gather(*tasks)
    assert order == ["c", "a", "b", "d"]
    assert (queue.admitted, queue.waiting) == (0, 0)


async def test_full_queue_refuses_entry_until_a_place_is_returned() -> None:
    queue = AdmissionQueue(2)
    assert [queue.enter() for _ in range(3)] == [True, True, False]
    queue.leave()
    assert queue.enter()
    assert queue.admitted == 2


async def test_waiter_cancelled_with_its_admission_returns_the_place() -> None:
    queue = AdmissionQueue(1)
    assert queue.enter()
    waiter = asyncio.create_task(queue.wait(0))
    await asyncio.sleep(0)
    queue.leave()
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    assert queue.admitted == 0


async def test_higher_capacity_admits_waiters_and_closing_refuses_the_rest() -> None:
    queue = AdmissionQueue(1)
    assert queue.enter()
    waiters = [asyncio.create_task(queue.wait(0)) for _ in range(3)]
    await asyncio.sleep(0)
    queue.resize(3)
    await asyncio.sleep(0)
    assert [waiter.done() for waiter in waiters] == [True, True, False]
    queue.close(RuntimeError("closed"))
    with pytest.raises(RuntimeError, match="closed"):
        await waiters[2]
    with pytest.raises(RuntimeError, match="closed"):
        await queue.wait(9)
