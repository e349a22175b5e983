"""Engines that are checked and closed after every test, and helpers to run them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kvpilot_engine import protocol
from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract.config import QUIET
from kvpilot_engine.engine import Engine

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "batch_size": 8,
    "num_workers": 16,
    "cache_strategy": "lru",
    "host_memory_mb": 0,
}


@dataclass
class Driver:
    """An engine, what it sent, and the logits of every token it chose: ``logits[id][position]``."""

    engine: Engine
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    finished: dict[str, protocol.Finished] = field(default_factory=dict)
    logits: dict[str, dict[int, torch.Tensor]] = field(default_factory=lambda: defaultdict(dict))

    def submit(self, name: str, prompt: list[int], new: int = 8, **rest: Any) -> None:
        self.engine.submit(protocol.Generate(id=name, prompt=prompt, max_new_tokens=new, **rest))

    def step(self) -> None:
        for message in self.engine.step():
            assert message.id not in self.finished, f"{message.id} went on after its end"
            if isinstance(message, protocol.Tokens):
                self.tokens[message.id] += message.ids
            else:
                self.finished[message.id] = message

    def run(self, most_steps: int = 20_000) -> None:
        for _ in range(most_steps):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"still working after {most_steps} steps")

    def settle(self) -> None:
        """Wait until every evicted block is encoded; at once when none is under way."""
        for _ in range(50):
            self.engine.cache.wait(1.0)
            self.engine.cache.poll()

    def ask(self, name: str, prompt: list[int], new: int = 8, **rest: Any) -> protocol.Finished:
        self.submit(name, prompt, new, **rest)
        self.run()
        return self.finished[name]

    def apply(
        self, generation: int = 1, epoch: int = 0, **values: Any
    ) -> protocol.Applied | protocol.Refused:
        return self.engine.apply(protocol.Apply("change", epoch, generation, values))

    def counter(self, name: str) -> float:
        return self.engine.sample("s").counters[name]

    def gauge(self, name: str) -> float:
        return self.engine.sample("s").gauges[name]


MakeEngine = Callable[..., Driver]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """``make_engine(model=..., clock=..., **config)``; integrity is checked when the test ends."""
    torch.set_num_threads(1)
    drivers: list[Driver] = []

    def make(
        model: str = "builtin/tiny-llama", clock: Callable[[], float] | None = None, **config: Any
    ) -> Driver:
        logits: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)

        def observe(name: str, position: int, row: torch.Tensor) -> None:
            assert position not in logits[name], f"{name} chose token {position} twice"
            logits[name][position] = row.clone()

        settings = KVCacheConfig.model_validate({**DEFAULTS, **config}, context=QUIET)
        rest = {} if clock is None else {"clock": clock}
        driver = Driver(Engine(settings, model, on_logits=observe, **rest), logits=logits)
        drivers.append(driver)
        return driver

    yield make
    for driver in drivers:
        driver.engine.check_integrity()
        driver.engine.close()


@pytest.fixture
def prompt() -> Callable[[int, int], list[int]]:
    """``prompt(length, seed)``: printable ASCII ids."""

    def make(length: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        ids: list[int] = torch.randint(0x20, 0x7F, (length,), generator=generator).tolist()
        return ids

    return make
