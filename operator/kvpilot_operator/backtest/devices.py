"""The engine of a backtest: a device, and what its requests cost.

Without a recording of real engines (`calibration`) it fits the objectives of the manifest. Its shape is that
of the real engine on the CPU (``bench/results/step_time_float32.md``): a step takes 2.1 ms and 0.15 ms a row,
a prompt token 0.085 ms. All three are stretched by one factor, so that the requests of a load are within the
objectives on an idle replica.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import Any

from kvpilot_operator.backtest.model import EngineModel, Fault
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.policy import Objectives

BASE_S, ROW_S, PREFILL_S = 0.0021, 0.00015, 0.000085
"""A step, what each row adds to it, and a prompt token that is not cached, s."""

UNLOADED_SHARES = (0.45, 0.3, 0.2, 0.13, 0.09)
"""Share of each latency objective that the requests which it is for take on an idle replica."""


@dataclass(frozen=True)
class Work:
    """What one request costs: prompt tokens that no cache serves, tokens of the answer, and cached ones."""

    uncached: float
    out: float
    cached: float = 0.0

    @staticmethod
    def mean(requests: Iterable[Work]) -> Work:
        """The mean of several.

        Raises:
            ValueError: there is none.
        """
        found = list(requests)
        return Work(*(fmean(getattr(work, item.name) for work in found) for item in fields(Work)))


@dataclass(frozen=True)
class Device:
    """``t(rows) = base_s + row_s x rows``; a prompt token costs ``prefill_s``, all in s.

    Attributes:
        context_s: what each token that a decoding row attends to adds to a step, s.
        attend_s: what each token that a computed prompt token attends to adds, s.
        hits: share of the tokens that an infinite cache would serve that its cache serves.
        noise: standard deviation of the log of a replica's speed.
    """

    base_s: float = BASE_S
    row_s: float = ROW_S
    prefill_s: float = PREFILL_S
    context_s: float = 0.0
    attend_s: float = 0.0
    hits: float = 1.0
    noise: float = 0.05

    @staticmethod
    def fitting(
        requests: Iterable[Work], objectives: Objectives, share_of_edge: float = UNLOADED_SHARES[0]
    ) -> Device:
        """The slowest device on which these requests, each alone, take a share of every objective."""
        device = Device()
        answered = objectives.signal == "request"
        took = sorted(device.latency_s(work if answered else replace(work, out=1.0), 1) for work in requests)
        factors = [
            share_of_edge * edge / took[min(len(took) - 1, int(share * len(took)))]
            for edge, share in objectives.latency.values()
        ]
        factor = min(factors, default=1.0)
        return replace(
            device,
            base_s=device.base_s * factor,
            row_s=device.row_s * factor,
            prefill_s=device.prefill_s * factor,
            context_s=device.context_s * factor,
            attend_s=device.attend_s * factor,
        )

    def work(self, prompt: float, cached: float, out: float) -> Work:
        """What a request costs, of whose prompt an infinite cache would serve ``cached`` tokens."""
        served = self.hits * cached
        return Work(prompt - served, out, served)

    def latency_s(self, work: Work, rows: int) -> float:
        """Time of a request beside ``rows - 1`` others of its kind, s."""
        context = work.uncached + work.cached + work.out / 2
        row_s = self.row_s + self.context_s * context
        prompt_s = self.prefill_s + self.attend_s * (work.cached + work.uncached / 2)
        prefill_s = work.uncached * prompt_s + self.context_s * work.cached
        return rows * prefill_s + work.out * (self.base_s + row_s * rows)

    def capacity(self, work: Work, config: Mapping[str, Any]) -> float:
        """Requests/s of one replica with a configuration (camelCase), all rows in use."""
        rows = min(int(value(config, "numWorkers")), int(value(config, "batchSize")))
        return rows / self.latency_s(work, rows)

    def model(self, fault: Fault | None = None) -> EngineModel:
        """The cost model of its engines. Whether a prompt is cached is up to the request."""
        base, row = self.base_s, self.row_s
        return EngineModel(
            step_s=lambda rows: base + row * rows,
            prefill_s=self.prefill_s,
            context_s=self.context_s,
            attend_s=self.attend_s,
            marginal_gain=None,
            hits=lambda config: self.hits,
            ceiling=1.0,
            noise=self.noise,
            warm_requests=200,
            start_slope=0.5,
            fault=fault or Fault(),
        )
