"""Stop strings and the gate: small parts with many cases."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot_engine.completion import StopStrings, check_length
from kvpilot_engine.errors import InvalidRequestError
from kvpilot_engine.gate import Gate

SMALL = st.text("ab", max_size=30)


@given(pieces=st.lists(SMALL, max_size=8), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_a_stream_where_they_would_cut_the_whole(
    pieces: list[str], stops: list[str]
) -> None:
    """Whatever the pieces: the shown text is the whole one up to the first stop string completed in it."""
    matcher, shown = StopStrings(stops), ""
    for piece in pieces:
        for character in piece:  # one at a time, as tokens come
            shown += matcher.push(character)
    shown += matcher.finish()
    whole = "".join(pieces)
    ends = [whole.index(stop) + len(stop) for stop in stops if stop in whole]
    if not ends:
        assert (shown, matcher.stopped) == (whole, False)
        return
    first = whole[: min(ends)]
    assert matcher.stopped
    assert shown == first[: min(first.index(stop) for stop in stops if stop in first)]


@given(text=SMALL, stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_shown_is_ever_part_of_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = "".join(matcher.push(character) for character in text)
    assert not any(stop in shown for stop in stops)


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        (0, 1, "prompt: at least one token is required"),
        (100, 1, "prompt: 100 tokens do not fit; this model's context is 100 tokens, of which .* 99"),
        (90, 11, "max_tokens: 11 new tokens after a prompt of 90 exceed .* at most 10 are possible"),
    ],
)  # fmt: skip
def test_lengths_that_do_not_fit(prompt: int, new: int, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        check_length("prompt", prompt, "max_tokens", new, 100)
    check_length("prompt", 90, "max_tokens", 10, 100)


async def test_gate_lets_the_urgent_first_then_in_order() -> None:
    gate, order = Gate(1), []

    async def pass_through(name: str, priority: int) -> None:
        await gate.enter(priority)
        order.append(name)
        await asyncio.sleep(0)
        gate.leave()

    await gate.enter(0)
    tasks = [asyncio.create_task(pass_through(*who)) for who in (("a", 0), ("b", 0), ("c", 5), ("d", -1))]
    await asyncio.sleep(0)
    assert gate.waiting == 4
    gate.leave()
    await asyncio.gather(*tasks)
    assert order == ["c", "a", "b", "d"]


async def test_cancelled_waiter_loses_no_place() -> None:
    gate = Gate(1)
    await gate.enter(0)
    waiter = asyncio.create_task(gate.enter(0))
    await asyncio.sleep(0)
    gate.leave()
    waiter.cancel()  # at the moment in which its place came
    await asyncio.gather(waiter, return_exceptions=True)
    await asyncio.wait_for(gate.enter(0), 1)


async def test_resized_and_closed_gate() -> None:
    gate = Gate(1)
    await gate.enter(0)
    waiters = [asyncio.create_task(gate.enter(0)) for _ in range(3)]
    await asyncio.sleep(0)
    gate.resize(3)
    await asyncio.sleep(0)
    assert [waiter.done() for waiter in waiters] == [True, True, False]
    gate.close(RuntimeError("closed"))
    with pytest.raises(RuntimeError, match="closed"):
        await waiters[2]
    with pytest.raises(RuntimeError, match="closed"):
        await gate.enter(9)
