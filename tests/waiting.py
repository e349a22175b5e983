"""Waiting for a condition: the limit is for a crowded machine, and only a broken product reaches it."""

from __future__ import annotations

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
