"""The simulated engine against the scheduler, cache and meter of the real one.

The core engine runs on a virtual clock, with a model that costs what a law says: then the two may differ by
what the simulation leaves out only, and not by the machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.config import QUIET
from kvpilot_engine.contract.metrics import TIERS, total
from kvpilot_engine.core.engine import Engine
from kvpilot_engine.ipc import messages
from kvpilot_engine.model.runner import Work as StepWork
from kvpilot_engine.model.runner import _by_length
from kvpilot_operator.backtest.calibration import calibrated
from kvpilot_operator.backtest.devices import Device, Work
from kvpilot_operator.backtest.engine import SimulatedEngine
from kvpilot_operator.backtest.model import SimulatedRequest
from kvpilot_operator.load.results import percentile
from kvpilot_operator.load.workload import poisson
from kvpilot_operator.tuning.observation import Counts, Promoted

LAW = Device(base_s=0.0021, row_s=0.00013, prefill_s=0.000085, context_s=0.45e-6, attend_s=0.06e-6, noise=0.0)

CONFIG: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "maxTokens": 16384, "maxStepTokens": 512, "numWorkers": 16,
    "batchSize": 16, "maxQueue": 5000, "requestTimeoutS": 300, "cacheStrategy": "lru",
}  # fmt: skip

WINDOW_S = 3.0

COSTS = ("base_s", "row_s", "prefill_s", "context_s", "attend_s")


@dataclass
class LawModel:
    """Stands in for the model: it takes what `LAW` says, and always answers with the same token."""

    now: float = 0.0

    def run(self, works: Sequence[StepWork], k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.now += LAW.base_s + LAW.row_s * len(works)
        for work in works:
            count = len(work.tokens)
            if work.start > 0 and count == 1:
                self.now += LAW.context_s * (work.start + 1)
            else:
                self.now += LAW.context_s * work.start + LAW.prefill_s * count
                self.now += LAW.attend_s * count * (work.start + count / 2)
        return self.logits(works)

    def logits(self, works: Sequence[StepWork]) -> torch.Tensor:
        logits = torch.zeros(sum(work.sample for work in works), 256)
        logits[:, 65] = 1.0
        return logits


@dataclass
class TableModel(LawModel):
    """It takes what ``bench/results/step_time_float32.md`` says of the real model, which no `Device` follows.

    Decoding rows are padded to the longest of their group; a prompt behind cached tokens reads them first.
    """

    def run(self, works: Sequence[StepWork], k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.now += 0.0021 + 78e-6 * len(works)
        for group in _by_length([(0, work) for work in works if len(work.tokens) == 1]):
            self.now += 0.49e-6 * len(group) * max(work.start + 1 for _, work in group)
        for work in works:
            if (count := len(work.tokens)) > 1:
                self.now += 71.7e-6 * count + 0.032e-6 * count * (work.start + count / 2)
                self.now += 0.9e-6 * (work.start + count) if work.start else 0.0
        return self.logits(works)


@dataclass
class Core:
    """A core engine on a virtual clock: latencies in order of arrival, s, and its windows."""

    config: dict[str, Any]
    model: type[LawModel] = LawModel
    latencies: list[float] = field(default_factory=list)
    windows: list[Counts] = field(default_factory=list)

    def play(self, requests: Sequence[SimulatedRequest]) -> Core:
        model, draw = self.model(), random.Random(1)
        config = KVCacheConfig.model_validate({**CONFIG, **self.config}, context=QUIET)
        engine = Engine(config, clock=lambda: model.now)
        engine._runner = model  # type: ignore[assignment]
        self.latencies = [0.0] * len(requests)
        before, ended, sent, due = Counts(), 0, 0, WINDOW_S
        while ended < len(requests):
            if not engine.has_work:
                model.now = max(model.now, requests[sent].at)
            while sent < len(requests) and requests[sent].at <= model.now:
                engine.submit(_message(sent, requests[sent], draw))
                sent += 1
            for message in engine.step():
                if isinstance(message, messages.Finished):
                    assert message.reason == "length", message
                    self.latencies[int(message.id)] = model.now - requests[int(message.id)].at
                    ended += 1
            if model.now >= due:
                now = _counts(engine, sent, ended)
                self.windows.append(_increase(now, before))
                before, due = now, due + WINDOW_S
        engine.close()
        return self


def _message(index: int, request: SimulatedRequest, draw: random.Random) -> messages.Generate:
    cached = int(request.cached)
    prompt = [66] * cached + draw.choices(range(3, 90), k=int(request.prompt) - cached)
    return messages.Generate(id=str(index), prompt=prompt, max_new_tokens=int(request.out), timeout_s=3600.0)


def _counts(engine: Engine, sent: int, ended: int) -> Counts:
    counters = engine.sample("").counters
    return Counts(
        arrivals=float(sent),
        outcomes={"ok": float(ended)},
        query_tokens=total(counters, names.QUERY_TOKENS_TOTAL),
        hit_tokens=sum(counters[names.HIT_TOKENS_TOTAL][tier] for tier in TIERS),
        output_tokens=total(counters, names.OUTPUT_TOKENS_TOTAL),
        busy_seconds=total(counters, names.STEP_BUSY_SECONDS_TOTAL),
        steps=total(counters, names.STEPS_TOTAL),
        step_rows=total(counters, names.STEP_ROWS_TOTAL),
    )


def _increase(now: Counts, before: Counts) -> Counts:
    grown = {
        name: getattr(now, name) - getattr(before, name)
        for name in (
            "arrivals",
            "query_tokens",
            "hit_tokens",
            "output_tokens",
            "busy_seconds",
            "steps",
            "step_rows",
        )
    }
    return Counts(outcomes={"ok": now.completed - before.completed}, **grown)


def load(
    use: float,
    prompt: int,
    out: int,
    *,
    cached: int = 0,
    seconds: float = 20.0,
    config: dict[str, Any] | None = None,
    device: Device = LAW,
) -> list[SimulatedRequest]:
    """Poisson arrivals at a share of the capacity, with log-normal sizes."""
    draw = random.Random(f"{use} {prompt} {out}")
    rate = use * device.capacity(Work(prompt - cached, out, cached), {**CONFIG, **(config or {})})
    return list(_requests(poisson(rate, seconds, draw), prompt - cached, out, cached, draw))


def _requests(
    times: Sequence[float], own: int, out: int, cached: int, draw: random.Random
) -> Iterator[SimulatedRequest]:
    for at in times:
        prompt = cached + max(8, round(own * draw.lognormvariate(-0.08, 0.4)))
        yield SimulatedRequest(at, prompt, cached, max(2, round(out * draw.lognormvariate(-0.08, 0.4))))


def simulated(
    config: dict[str, Any], requests: Sequence[SimulatedRequest], device: Device = LAW
) -> list[float]:
    engine = SimulatedEngine("u0", "chat-0", Promoted(1, {**CONFIG, **config}), device.model(), 0.0)
    engine.warm()
    engine.run(1e6, [replace(request) for request in requests])
    engine.meter()
    return [took for _, took, _ in engine.ended]


@pytest.mark.parametrize(
    ("config", "requests"),
    [
        ({}, load(0.4, 256, 32)),
        ({}, load(0.9, 96, 24)),
        ({}, load(0.7, 256, 24, cached=128)),
        ({}, load(0.7, 384, 24, cached=320)),
        ({}, load(1.3, 128, 20, seconds=8.0)),
        ({"numWorkers": 8, "batchSize": 4}, load(0.8, 64, 32, config={"numWorkers": 4, "batchSize": 4})),
        ({"maxStepTokens": 64}, load(0.7, 96, 24)),
    ],
    ids=["light", "busy", "cached prefix", "mostly cached", "overload", "few rows", "small chunks"],
)
def test_latencies_are_those_of_the_real_scheduler(
    config: dict[str, Any], requests: list[SimulatedRequest]
) -> None:
    real, found = sorted(Core(config).play(requests).latencies), sorted(simulated(config, requests))
    for share in (0.5, 0.95):
        assert percentile(found, share) == pytest.approx(percentile(real, share), rel=0.05)
    for edge in names.EDGES_S:
        within = [sum(took <= edge for took in latencies) / len(real) for latencies in (real, found)]
        assert within[1] == pytest.approx(within[0], abs=0.04), f"within {edge} s"


def test_costs_are_found_in_the_counters_of_the_engine() -> None:
    loads = (
        load(0.35, 96, 24), load(0.75, 64, 32), load(0.6, 320, 24), load(0.5, 480, 8),
        load(0.6, 320, 24, cached=256),
    )  # fmt: skip
    device = calibrated(window for requests in loads for window in Core({}).play(requests).windows)
    assert device.base_s == pytest.approx(LAW.base_s, rel=0.03)
    assert device.row_s == pytest.approx(LAW.row_s, rel=0.1)
    prompt_s = [item.prefill_s + 128 * item.attend_s for item in (device, LAW)]
    assert prompt_s[0] == pytest.approx(prompt_s[1], rel=0.05), "a token of 256; sizes differ within a window"
    assert device.attend_s == pytest.approx(LAW.attend_s, rel=0.3)
    assert device.context_s == pytest.approx(LAW.context_s, rel=0.3), "a tenth of a step's time"


@cache
def fitted() -> Device:
    """The device of `TableModel`, from counters under loads of several shapes."""
    loads = (
        load(0.3, 64, 32), load(0.7, 96, 24), load(0.5, 48, 48), load(0.8, 160, 24), load(0.4, 480, 8),
        load(0.5, 192, 40, cached=160),
    )  # fmt: skip
    return calibrated(window for requests in loads for window in Core({}, TableModel).play(requests).windows)


@pytest.mark.parametrize(
    ("use", "prompt", "cached"),
    [(0.5, 96, 0), (0.7, 96, 0), (0.9, 96, 0), (0.7, 320, 256)],
    ids=["half", "70%", "90%", "cached prefix"],
)
def test_loads_that_were_not_fitted_are_within_a_tenth(use: float, prompt: int, cached: int) -> None:
    requests = load(use, prompt, 24, cached=cached, device=fitted(), seconds=30.0)
    real = sorted(Core({}, TableModel).play(requests).latencies)
    found = sorted(simulated({}, requests, fitted()))
    assert percentile(found, 0.95) == pytest.approx(percentile(real, 0.95), rel=0.1)
    for edge in names.EDGES_S:
        within = [sum(took <= edge for took in latencies) / len(real) for latencies in (real, found)]
        assert within[1] == pytest.approx(within[0], abs=0.1), f"within {edge} s"


def window(steps: float, rows: float, prompt: float = 100.0) -> Counts:
    """A second of a device with the costs of `LAW`, with ten requests of 20 tokens."""
    context = (prompt + 10.0) * 190.0
    busy = LAW.base_s * steps + LAW.row_s * rows + LAW.prefill_s * 10 * prompt + LAW.context_s * context
    busy += LAW.attend_s * 10 * prompt * prompt / 2
    return Counts(
        arrivals=10.0,
        outcomes={"ok": 10.0},
        query_tokens=10 * prompt,
        output_tokens=200.0,
        busy_seconds=busy,
        steps=steps,
        step_rows=rows,
    )


DIFFERENT = [
    window(100, 300),
    window(200, 500, 150),
    window(300, 1500, 60),
    window(300, 4000, 200),
    window(150, 900, 320),
]


def test_exact_windows_give_exact_costs() -> None:
    assert calibrated(DIFFERENT) == replace(
        LAW, **{name: pytest.approx(getattr(LAW, name)) for name in COSTS}
    )


def test_a_cost_is_never_below_nothing() -> None:
    cheaper = [replace(item, busy_seconds=item.busy_seconds - 0.0002 * item.step_rows) for item in DIFFERENT]
    device = calibrated(cheaper)
    assert device.row_s == 0.0
    assert min(device.base_s, device.prefill_s, device.context_s) >= 0.0


def test_idle_windows_say_nothing() -> None:
    assert calibrated([Counts(), *DIFFERENT]) == calibrated(DIFFERENT)


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        ([window(100, 200)] * 3, "windows with steps: at least 5 are needed, got 3"),
        ([window(100, 200)] * 6, "windows: they are too alike to separate steps, rows, "),
        ([replace(window(100, 200), hit_tokens=1000.0)] * 6, "windows: they show no computed prompt tokens"),
    ],
)
def test_windows_that_tell_too_little_are_refused(windows: list[Counts], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        calibrated(windows)
