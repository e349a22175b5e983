"""Recorded traffic as a load: a trace of requests, laid over itself until it is as large as wanted."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path

from kvpilot_operator.backtest.model import SimulatedRequest
from kvpilot_operator.backtest.recording import Recording, is_recording, read_recording
from kvpilot_operator.load.trace import TRACE_BLOCK_TOKENS, TraceRequest, read_trace

SPREAD_S = 10.0
"""The copies of one recorded request come within this time, so that the load keeps its shape, s."""

MAX_CACHED = 0.98
"""Share of a prompt that a cache can serve."""


SIGMA = 0.4
"""Standard deviation of the log of sizes where a recording holds means only."""

SESSIONS = 1000
"""Sessions of a recording, which counts none."""

_ARRIVAL = attrgetter("at")


@dataclass(frozen=True)
class RecordedRequest:
    """One request: s since the start, tokens, and those of the prompt that an infinite cache serves."""

    at: float
    prompt: float
    cached: float
    out: float
    session: int


def recorded(path: Path, seed: int) -> list[RecordedRequest]:
    """The requests of a Mooncake or Azure trace, or such as a recording counted.

    What is cached follows from the block ids of a Mooncake trace. Azure records none, so that the share is
    drawn: half of the prompt in the mean.

    Raises:
        LoadError: the file is broken, empty or out of order; names file, line and fault.
    """
    if is_recording(path):
        return _drawn(read_recording(path), seed)
    draw = random.Random(f"{seed} cached")
    seen: set[int] = set()
    return [_recorded(index, item, seen, draw) for index, item in enumerate(_read(path))]


def _drawn(recording: Recording, seed: int) -> list[RecordedRequest]:
    """Requests in the recorded number at random times of each interval; none in a gap."""
    draw, found = random.Random(f"{seed} recording"), []
    for interval in recording.intervals:
        whole, rest = divmod(interval.arrivals, 1.0)
        times = sorted(draw.random() for _ in range(int(whole) + (draw.random() < rest)))
        for share in times:
            size = math.exp(draw.gauss(-(SIGMA**2) / 2, SIGMA))
            prompt = max(1.0, interval.prompt * size)
            cached = min(MAX_CACHED * prompt, interval.cached * size)
            out = max(1.0, float(round(interval.output * math.exp(draw.gauss(-(SIGMA**2) / 2, SIGMA)))))
            at = interval.at + share * recording.step
            found.append(RecordedRequest(at, prompt, cached, out, draw.randrange(SESSIONS)))
    return found


@lru_cache(2)
def _read(path: Path) -> list[TraceRequest]:
    return read_trace(path, ordered=True)


def _recorded(index: int, item: TraceRequest, seen: set[int], draw: random.Random) -> RecordedRequest:
    prompt = float(item.input_tokens)
    if item.blocks:
        known = next((n for n, block in enumerate(item.blocks) if block not in seen), len(item.blocks))
        seen.update(item.blocks)
        cached = min(float(known * TRACE_BLOCK_TOKENS), prompt - 1.0)
        session = item.blocks[min(1, len(item.blocks) - 1)]  # the first block is often one of all
    else:
        cached, session = prompt * draw.betavariate(2.0, 2.0), index
    return RecordedRequest(
        item.at, prompt, min(cached, MAX_CACHED * prompt), float(item.output_tokens), session
    )


def replayed(
    trace: Sequence[RecordedRequest], scale: float, seconds: float, seed: int
) -> Iterator[SimulatedRequest]:
    """``scale`` requests in the mean for each recorded one, within SPREAD_S of it, for ``seconds``."""
    draw = random.Random(f"{seed} replay").random
    due: defaultdict[int, list[SimulatedRequest]] = defaultdict(list)  # by second
    made = second = 0
    for item in trace:
        start, prompt, cached, out, session = item.at, item.prompt, item.cached, item.out, item.session * 1009
        if start >= seconds:
            break
        while second + 1 <= start:
            yield from sorted(due.pop(second, ()), key=_ARRIVAL)
            second += 1
        for _ in range(int(scale) + (draw() < scale % 1.0)):
            at = start + SPREAD_S * draw() if scale > 1.0 else start
            due[int(at)].append(SimulatedRequest(at, prompt, cached, out, session + made % 1009))
            made += 1
    for second in sorted(due):
        yield from (request for request in sorted(due[second], key=_ARRIVAL) if request.at < seconds)
