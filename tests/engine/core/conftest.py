"""Engines that are checked and closed after every test, and helpers to run them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract.config import QUIET
from kvpilot_engine.core.engine import Engine
from kvpilot_engine.ipc import messages
from kvpilot_engine.model.determinism import self_check
from kvpilot_engine.model.loading import LoadedModel, load_model
from kvpilot_engine.model.runner import ModelRunner, measure_decode

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
    finished: dict[str, messages.Finished] = field(default_factory=dict)
    logits: dict[str, dict[int, torch.Tensor]] = field(default_factory=lambda: defaultdict(dict))

    def submit(self, name: str, prompt: list[int], new: int = 8, **rest: Any) -> None:
        self.engine.submit(messages.Generate(id=name, prompt=prompt, max_new_tokens=new, **rest))

    def step(self) -> None:
        for message in self.engine.step():
            assert message.id not in self.finished, f"{message.id} went on after its end"
            if isinstance(message, messages.Tokens):
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

    def ask(self, name: str, prompt: list[int], new: int = 8, **rest: Any) -> messages.Finished:
        self.submit(name, prompt, new, **rest)
        self.run()
        return self.finished[name]

    def apply(
        self, generation: int = 1, epoch: int = 0, **values: Any
    ) -> messages.Applied | messages.Refused:
        return self.engine.apply(messages.Apply("change", epoch, generation, values))

    def counter(self, name: str, label: str = "") -> float:
        return self.engine.sample("s").counters[name][label]

    def gauge(self, name: str, label: str = "") -> float:
        return self.engine.sample("s").gauges[name][label]


MakeEngine = Callable[..., Driver]


@pytest.fixture(scope="session")
def kept() -> dict[str, Callable[..., Any]]:
    """What most of a start is spent on, each kept for later engines: functions by their names in the engine.

    Engines share the weights, which nothing writes, the check that they are deterministic, and the measured
    curve of decode steps.
    """
    models: dict[Any, LoadedModel] = {}
    checked: set[Any] = set()
    curves: dict[Any, dict[int, float]] = {}

    def load(name: str, config: KVCacheConfig, revision: str) -> LoadedModel:
        key = name, config.device, config.dtype, config.deterministic, revision
        if key not in models:
            models[key] = load_model(name, config, revision)
        return models[key]

    def check(runner: ModelRunner) -> None:
        if runner.model.module not in checked:
            self_check(runner)
        checked.add(runner.model.module)

    def measure(runner: ModelRunner) -> dict[int, float]:
        key = runner.model.device, runner.model.dtype
        if key not in curves:
            curves[key] = measure_decode(runner)
        return curves[key]

    return {"load_model": load, "self_check": check, "measure_decode": measure}


@pytest.fixture
def make_engine(kept: dict[str, Callable[..., Any]], monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeEngine]:
    """``make_engine(model=..., clock=..., **config)``; integrity is checked when the test ends."""
    for name, function in kept.items():
        monkeypatch.setattr(f"kvpilot_engine.core.engine.{name}", function)
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
