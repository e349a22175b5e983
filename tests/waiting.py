"""Waiting for a condition: the limit is for a crowded machine, and only a broken product reaches it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

import pytest

T = TypeVar("T")


def eventually(
    probe: Callable[[], T],
    timeout_s: float = 60.0,
    why: Callable[[], str] = lambda: "the condition did not become true",
) -> T:
    """The first true answer of ``probe``, within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        if answer := probe():
            return answer
        if time.monotonic() > deadline:
            pytest.fail(why())
        time.sleep(0.02)


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Let the other tasks of the loop run until ``condition`` is true; TimeoutError after ``timeout_s``."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the condition is a plain fact of another task or process
            await asyncio.sleep(0.005)
