"""Effect of each hot knob on its stage or counter: two engines that differ only in the knob.

Both arms serve the same rounds of requests in turn, so that other load on the machine affects both. The
engines are not restarted: every value is applied hot and the cache stays. A figure is the second arm's value
divided by the first arm's: the median of the rounds, or of their sums if rounds vary.
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

from bench import command, results
from bench.command import CannotRunError
from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.config import QUIET
from kvpilot_engine.contract.metrics import TIERS, Samples, Stage
from kvpilot_engine.core.engine import Engine
from kvpilot_engine.ipc import messages

Prompts = list[list[int]]
Load = Callable[[], Iterator[Prompts]]
"""Endless rounds of prompts; those of one round are submitted at once."""

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
    """Random tokens of a new seed, so that no prompts share a beginning."""
    return random.Random(next(_seeds)).choices(_IDS, k=length)


def fresh(count: int, length: int) -> Load:
    """New prompts in each round."""

    def rounds() -> Iterator[Prompts]:
        while True:
            yield [prompt(length) for _ in range(count)]

    return rounds


def revisits(count: int, length: int, at_once: int, *, tail: int = 16) -> Load:
    """The same prompts repeatedly in one order, each with ``tail`` new tokens."""

    def rounds() -> Iterator[Prompts]:
        known = [prompt(length) for _ in range(count)]
        while True:
            for at in range(0, count, at_once):
                yield [k + prompt(tail) for k in known[at : at + at_once]]

    return rounds


def drawn(count: int, length: int, at_once: int) -> Load:
    """A random sample of the same prompts in each round, with the same seed in every trial."""

    def rounds() -> Iterator[Prompts]:
        known = [prompt(length) for _ in range(count)]
        chance = random.Random(1)
        while True:
            yield chance.sample(known, at_once)

    return rounds


def scanned(count: int, length: int, scans: int, *, calm: int) -> Load:
    """``count`` prompts in turn; after ``calm`` rounds, ``scans`` new prompts follow each."""

    def rounds() -> Iterator[Prompts]:
        known = [prompt(length) for _ in range(count)]
        for number in itertools.count():
            yield [known[number % count]]
            for _ in range(scans if number >= calm else 0):
                yield [prompt(length)]

    return rounds


@dataclass(frozen=True)
class Effect:
    """One measure and the bounds of its ratio (second arm over first)."""

    measure: str
    at_least: float = 0.0
    at_most: float = float("inf")


@dataclass(frozen=True)
class Trial:
    """One knob between two values.

    Attributes:
        base: values of both arms that differ from ``BASE``, so that the knob has an effect.
        warm: warm-up rounds, until the content of the cache is steady.
        rounds: measured rounds.
        pooled: compare sums over the rounds, because single rounds differ.
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
    # Between two uses of a prompt pass 4 x 16 pages of prompts and 8 x 16 of scans; the pool has 160.
    Trial(
        "cacheStrategy", ("lru", "lfu"), scanned(4, 256, 2, calm=12), (Effect("hit rate", at_least=1.5),),
        {"maxTokens": 2560}, output=2, warm=12, rounds=24, pooled=True,
    ),
    # Between two uses pass 64 pages of scans, fewer than the pool's 96; by age the prompt is soon the oldest.
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
    """One engine with one of the two values."""

    def __init__(self) -> None:
        config = KVCacheConfig.model_validate({**BASE, "dtype": "float32", "device": "cpu"}, context=QUIET)
        self._engine = Engine(config)
        self._generation = 0
        self._sent = 0

    def begin(self, values: Mapping[str, Any]) -> None:
        """Empty the cache, so that trials do not affect each other, and apply these values hot."""
        for change in ({"maxTokens": 128, "hostMemoryMb": 0}, values):
            self._generation += 1
            answer = self._engine.apply(
                messages.Apply(id="a", generation=self._generation, epoch=1, values=dict(change))
            )
            assert isinstance(answer, messages.Applied), answer
            while self._engine.has_work:
                self._engine.step()

    def serve(self, prompts: Prompts, output: int) -> dict[str, float]:
        """Serve one round; sums of stage seconds and counter increments.

        Raises:
            CannotRunError: a request failed.
        """
        before = _series(self._engine.sample("s").counters)
        for tokens in prompts:
            self._sent += 1
            self._engine.submit(
                messages.Generate(id=str(self._sent), prompt=tokens, max_new_tokens=output, timeout_s=3600.0)
            )
        sums: dict[str, float] = defaultdict(float)
        while self._engine.has_work:
            for message in self._engine.step():
                if not isinstance(message, messages.Finished):
                    continue
                if message.reason not in {"length", "stop"}:
                    raise CannotRunError(f"a request ended with {message.reason}: {message.message}")
                sums["requests"] += 1
                for stage, seconds in message.stages.items():
                    sums[stage] += seconds
        after = self._engine.sample("s")
        for series, value in _series(after.counters).items():
            sums[series] += value - before[series]
        sums["held"] = after.gauges[names.CACHED_PAGES]["host"] / 8
        return sums

    def close(self) -> None:
        """Check the integrity of the cache and stop the engine."""
        self._engine.check_integrity()
        self._engine.close()


def _series(samples: Samples) -> dict[str, float]:
    """Values by metric name, followed by the label's value if there is one."""
    return {
        f"{name} {label}".rstrip(): value
        for name, values in samples.items()
        for label, value in values.items()
    }


def measured(sums: Mapping[str, float], rounds: int = 1) -> dict[str, float]:
    """Measures by the name that effects use; one without data is absent."""
    requests = sums["requests"]
    hits = sum(sums[f"{names.HIT_TOKENS_TOTAL} {tier}"] for tier in TIERS)
    found = {f"{stage.value}{SECONDS_PER_REQUEST}": sums[stage.value] / requests for stage in Stage}
    found |= {
        "tokens/s": sums[names.OUTPUT_TOKENS_TOTAL] / sums[names.STEP_BUSY_SECONDS_TOTAL],
        "steps per request": sums[names.STEPS_TOTAL] / requests,
        "hit rate": hits / sums[names.QUERY_TOKENS_TOTAL],
        "prefetched blocks used per request": sums[f"{names.PREFETCH_BLOCKS_TOTAL} used"] / requests,
        "blocks held": sums["held"] / rounds,
    }
    if blocks := sum(sums[f"{names.TIER_LOAD_BLOCKS_TOTAL} {tier}"] for tier in TIERS[1:]):
        found["decode s per block"] = sums[f"{names.CODEC_SECONDS_TOTAL} decode"] / blocks
    return found


def run_trial(trial: Trial, arms: tuple[Arm, Arm]) -> tuple[dict[str, float], dict[str, float]]:
    """Measures of both arms: medians over the rounds, or of the pooled sums."""
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
    """Second over first; infinite if only the first is 0, 1 if both are."""
    return second / first if first else float("inf") if second else 1.0


def measure(wanted: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Figures, and a line for each effect that is out of its bounds."""
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
    """Exit status 0 if every knob has its effects, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--knob", action="append", default=[], help="camelCase; default: all")
    parser.add_argument("--output", type=Path, default=results.DIRECTORY)
    options = parser.parse_args(argv)
    known = {trial.knob for trial in TRIALS}
    if unknown := sorted(set(options.knob) - known):
        raise CannotRunError(f"--knob: {', '.join(unknown)}: unknown, allowed: {', '.join(sorted(known))}")
    torch.set_num_threads(1)
    figures, failed = measure(options.knob)
    results.write("knob-effects", "Effect of each hot knob, second value over first", figures, options.output)
    for line in failed:
        print(f"knob_effects: FAILED: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(command.run("knob_effects", main))
