"""What each hot knob does to its stage or counter: two engines side by side that differ in the knob alone.

Both arms serve the same requests in turns, round by round, so that what else the machine does falls on both.
The engines run through: every value is applied hot, and the cache goes on. A figure is that of the second
arm over that of the first, the median of the rounds, or of the sums where rounds are alike only on the whole.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import results
from kvpilot_engine import protocol
from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.config import QUIET
from kvpilot_engine.contract.metrics import Stage
from kvpilot_engine.engine import Engine

Prompts = list[list[int]]
Load = Callable[[], Iterator[Prompts]]
"""Rounds of prompts without an end; those of one round are submitted at once."""

BASE: dict[str, Any] = {
    "numWorkers": 16,
    "batchSize": 16,
    "maxStepTokens": 512,
    "maxTokens": 8192,
    "cacheStrategy": "lru",
    "hostMemoryMb": 0,
    "useCompression": True,
    "compressionRatio": 0.52,
    "enablePrefetch": True,
    "prefetchSize": 4,
}

_IDS = range(3, 90)  # printable characters of the built-in model
_seeds = iter(range(1_000_000))


def prompt(length: int) -> list[int]:
    """Tokens that no prompt before has begun with."""
    return random.Random(next(_seeds)).choices(_IDS, k=length)


def fresh(count: int, length: int) -> Load:
    """New prompts in each round."""

    def rounds() -> Iterator[Prompts]:
        while True:
            yield [prompt(length) for _ in range(count)]

    return rounds


def revisits(count: int, length: int, at_once: int, *, tail: int = 16) -> Load:
    """The same prompts again and again in one order, each with ``tail`` new tokens."""

    def rounds() -> Iterator[Prompts]:
        known = [prompt(length) for _ in range(count)]
        while True:
            for at in range(0, count, at_once):
                yield [k + prompt(tail) for k in known[at : at + at_once]]

    return rounds


def drawn(count: int, length: int, at_once: int) -> Load:
    """Some of the same prompts at random, the same draws for every trial."""

    def rounds() -> Iterator[Prompts]:
        known = [prompt(length) for _ in range(count)]
        chance = random.Random(1)
        while True:
            yield chance.sample(known, at_once)

    return rounds


def scanned(count: int, length: int, scans: int, *, calm: int) -> Load:
    """A few prompts in turn, after the first ``calm`` rounds with ``scans`` new ones behind each."""

    def rounds() -> Iterator[Prompts]:
        known = [prompt(length) for _ in range(count)]
        for number in itertools.count():
            yield [known[number % count]]
            for _ in range(scans if number >= calm else 0):
                yield [prompt(length)]

    return rounds


@dataclass(frozen=True)
class Effect:
    """One measure, and what is claimed of its ratio: it is at least, or at most, ``bound``."""

    measure: str
    at_least: float = 0.0
    at_most: float = float("inf")


@dataclass(frozen=True)
class Trial:
    """One knob between two values.

    Attributes:
        base: values of both arms that differ from ``BASE``, and what makes the knob matter.
        warm: rounds that do not count, until the cache holds what it will hold.
        rounds: that count.
        pooled: rounds differ, so sums over them are compared instead of each with its counterpart.
    """

    knob: str
    arms: tuple[Any, Any]
    load: Load
    effects: tuple[Effect, ...]
    base: Mapping[str, Any] = field(default_factory=dict)
    output: int = 8
    warm: int = 1
    rounds: int = 5
    pooled: bool = False


SECONDS_PER_REQUEST = " s per request"

TRIALS: tuple[Trial, ...] = (
    Trial(
        "numWorkers", (1, 8), fresh(12, 32),
        (Effect("admission_wait" + SECONDS_PER_REQUEST, at_most=0.5), Effect("tokens/s", at_least=1.3)),
    ),
    Trial(
        "batchSize", (1, 8), fresh(12, 32),
        (Effect("batch_wait" + SECONDS_PER_REQUEST, at_most=0.5), Effect("tokens/s", at_least=1.3)),
    ),
    Trial(
        "maxStepTokens", (64, 1024), fresh(1, 512),
        (
            Effect("steps per request", at_most=0.5),
            Effect("prefill" + SECONDS_PER_REQUEST, at_most=1.0),
        ),
        output=2, rounds=9,
    ),
    Trial(
        "maxTokens", (1024, 8192), drawn(12, 256, 2), (Effect("hit rate", at_least=1.5),),
        output=2, warm=12, rounds=16, pooled=True,
    ),
    # Four prompts return after 4 x 16 pages of their own and 8 x 16 of scans, more than the 160 of the pool.
    Trial(
        "cacheStrategy", ("lru", "lfu"), scanned(4, 256, 2, calm=12), (Effect("hit rate", at_least=1.5),),
        {"maxTokens": 2560}, output=2, warm=12, rounds=24, pooled=True,
    ),
    # One prompt returns after 64 pages of scans, which fit the 96 of the pool; by age it is soon the oldest.
    Trial(
        "cacheStrategy", ("fifo", "lru"), scanned(1, 257, 4, calm=0), (Effect("hit rate", at_least=1.1),),
        {"maxTokens": 1600}, output=2, warm=5, rounds=40, pooled=True,
    ),
    Trial(
        "prefetchSize", (0, 8), revisits(20, 512, 4),
        (
            Effect("tier_load" + SECONDS_PER_REQUEST, at_most=0.8),
            Effect("prefetched blocks used per request", at_least=1.0),
        ),
        {"hostMemoryMb": 64, "maxTokens": 8192, "numWorkers": 1, "compressionRatio": 0.32},
        output=2, warm=6, rounds=10,
    ),
    Trial(
        "useCompression", (False, True), drawn(16, 512, 4),
        (Effect("blocks held", at_least=1.5), Effect("hit rate", at_least=1.2)),
        {"hostMemoryMb": 8, "maxTokens": 2048}, output=2, warm=8, rounds=8, pooled=True,
    ),
    Trial(
        "compressionRatio", (0.32, 1.0), drawn(16, 512, 4),
        (Effect("blocks held", at_most=0.7), Effect("decode s per block", at_most=1.0)),
        {"hostMemoryMb": 8, "maxTokens": 2048}, output=2, warm=8, rounds=8, pooled=True,
    ),
)  # fmt: skip


class Arm:
    """One engine, and what it has measured since ``begin``."""

    def __init__(self) -> None:
        config = KVCacheConfig.model_validate({**BASE, "dtype": "float32", "device": "cpu"}, context=QUIET)
        self._engine = Engine(config)
        self._generation = 0
        self._sent = 0

    def begin(self, values: Mapping[str, Any]) -> None:
        """Empty the cache, as what is left of another trial would tell in this one, and take these values."""
        for change in ({"maxTokens": 128, "hostMemoryMb": 0}, values):
            self._generation += 1
            answer = self._engine.apply(
                protocol.Apply(id="a", generation=self._generation, epoch=1, values=dict(change))
            )
            assert isinstance(answer, protocol.Applied), answer
            while self._engine.has_work:
                self._engine.step()

    def serve(self, prompts: Prompts, output: int) -> dict[str, float]:
        """One round; sums of what it took."""
        before = self._engine.sample("s").counters
        for tokens in prompts:
            self._sent += 1
            self._engine.submit(
                protocol.Generate(id=str(self._sent), prompt=tokens, max_new_tokens=output, timeout_s=3600.0)
            )
        sums: dict[str, float] = defaultdict(float)
        while self._engine.has_work:
            for message in self._engine.step():
                if not isinstance(message, protocol.Finished):
                    continue
                if message.reason not in {"length", "stop"}:
                    raise RuntimeError(f"a request ended with {message.reason}: {message.message}")
                sums["requests"] += 1
                for stage, seconds in message.stages.items():
                    sums[stage] += seconds
        after = self._engine.sample("s")
        for name, value in after.counters.items():
            sums[name] += value - before[name]
        sums["held"] = after.gauges[f"{names.CACHED_PAGES}{{tier=host}}"] / 8
        return sums

    def close(self) -> None:
        """Check the cache, and end."""
        self._engine.check_integrity()
        self._engine.close()


def measured(sums: Mapping[str, float], rounds: int = 1) -> dict[str, float]:
    """The measures that effects name; absent where nothing was counted."""
    requests = sums["requests"]
    hits = sum(sums[f"{names.HIT_TOKENS_TOTAL}{{tier={tier}}}"] for tier in ("pool", "host"))
    found = {f"{stage.value}{SECONDS_PER_REQUEST}": sums[stage.value] / requests for stage in Stage}
    found |= {
        "tokens/s": sums[names.OUTPUT_TOKENS_TOTAL] / sums[names.STEP_BUSY_SECONDS_TOTAL],
        "steps per request": sums[names.STEPS_TOTAL] / requests,
        "hit rate": hits / sums[names.QUERY_TOKENS_TOTAL],
        "prefetched blocks used per request": sums[f"{names.PREFETCH_BLOCKS_TOTAL}{{result=used}}"]
        / requests,
        "blocks held": sums["held"] / rounds,
    }
    if blocks := sums[names.TIER_LOAD_BLOCKS_TOTAL]:
        found["decode s per block"] = sums[f"{names.CODEC_SECONDS_TOTAL}{{op=decode}}"] / blocks
    return found


def run_trial(trial: Trial, arms: tuple[Arm, Arm]) -> tuple[dict[str, float], dict[str, float]]:
    """Measures of both arms: the medians over the rounds, or of the sums."""
    for arm, value in zip(arms, trial.arms, strict=True):
        arm.begin({**BASE, **trial.base, trial.knob: value})
    load = trial.load()
    taken: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for number in range(-trial.warm, trial.rounds):
        prompts = next(load)
        order = (0, 1) if number % 2 else (1, 0)
        for side in order:
            sums = arms[side].serve(prompts, trial.output)
            if number >= 0:
                taken[side].append(sums)
    return _middle(taken[0], trial.pooled), _middle(taken[1], trial.pooled)


def _middle(rounds: list[dict[str, float]], pooled: bool) -> dict[str, float]:
    if pooled:
        keys = {key for sums in rounds for key in sums}
        return measured(
            defaultdict(float, {key: sum(r.get(key, 0.0) for r in rounds) for key in keys}), len(rounds)
        )
    each = [measured(sums) for sums in rounds]
    return {key: statistics.median(r[key] for r in each) for key in each[0] if all(key in r for r in each)}


def ratio(first: float, second: float) -> float:
    """Second over first; infinite where the first is nothing."""
    return second / first if first else float("inf") if second else 1.0


def measure(wanted: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Figures, and a line for each effect that was not seen."""
    arms = (Arm(), Arm())
    figures: dict[str, Any] = {}
    failed = []
    for trial in TRIALS:
        if wanted and trial.knob not in wanted:
            continue
        first, second = run_trial(trial, arms)
        change = f"{trial.knob} {trial.arms[0]} -> {trial.arms[1]}"
        for effect in trial.effects:
            a, b = first.get(effect.measure, 0.0), second.get(effect.measure, 0.0)
            times = ratio(a, b)
            key = f"{change}: {effect.measure}"
            figures[key] = f"x {times:.2f} ({a:.4g} -> {b:.4g})"
            print(f"{key}: {figures[key]}", flush=True)
            if not effect.at_least <= times <= effect.at_most:
                failed.append(f"{key} is x {times:.2f}")
    for arm in arms:
        arm.close()
    return figures, failed


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when every knob has its effect, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--knob", action="append", default=[], help="camelCase; default: all")
    parser.add_argument("--output", type=Path, default=results.DIRECTORY)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    figures, failed = measure(options.knob)
    results.write("knob-effects", "What each hot knob does, second value over first", figures, options.output)
    for line in failed:
        print(f"knob_effects: FAILED: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
