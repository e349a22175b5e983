"""The scenarios and the load phases of the performance guides (``docs/guides/playbooks.md``).

Each begins where the guide says that it does, and ends with the objective met by the knob that it names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.operator.backtest.simulations import WIDE, assert_settled, recovered, simulate

from kvpilot_operator.backtest.model import EngineModel
from kvpilot_operator.backtest.simulation import Simulation
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.rules.order import REMEDIES

UNTUNED = {"numWorkers": 4, "batchSize": 1}


def made(sim: Simulation) -> list[str]:
    """Rules whose changes stay, in their order; every change that was begun stays."""
    kept = [record.rule for record in sim.records if record.outcome in {"Promoted", "ScaledOut"}]
    begun = [record.rule for record in sim.records if record.outcome in {"Started", "ScaledOut"}]
    assert kept == begun, sim.report()
    return kept


def states(sim: Simulation) -> dict[str, str]:
    return {item.name: item.state for item in sim.decisions[-1][1].objectives}


def overlaid(sim: Simulation, *knobs: str) -> tuple[Any, ...]:
    return tuple(value(sim.promoted.config, knob) for knob in knobs)


@pytest.mark.slow
@pytest.mark.parametrize(("pace", "surge"), [("Fast", 60.0), ("Standard", 900.0)])
def test_high_traffic_gets_workers_and_a_batch_for_them(pace: str, surge: float) -> None:
    sim = simulate(UNTUNED, pace=pace, load=lambda t: 20.0 if t < surge else 180.0).run(surge + 600)
    assert made(sim) == ["workers-up"], sim.report()
    workers, batch = overlaid(sim, "numWorkers", "batchSize")
    assert batch == workers > UNTUNED["numWorkers"]
    assert recovered(sim), sim.report()
    assert_settled(sim)


def test_high_traffic_beyond_the_guides_workers_and_batch_gets_replicas() -> None:
    sim = simulate(
        {"numWorkers": 32, "batchSize": 20},
        replicas=2,
        scaling={"min": 2, "max": 8},
        objectives={"latency": {"p50Ms": 200}},
        load=lambda t: 60.0 if t < 60 else 220.0,
        model=EngineModel(step_s=lambda rows: 0.016 + 0.004 * rows, marginal_gain=None),
    ).run(300)
    assert set(made(sim)) == {"replicas-up"}, sim.report()
    assert sim.cluster.desired_replicas > 2
    assert recovered(sim), sim.report()


@pytest.mark.slow
def test_high_traffic_that_waits_for_loads_prefetches_sixteen_blocks() -> None:
    model = EngineModel(
        tier_s=lambda c: max(0.0, 0.9 - 0.055 * value(c, "prefetchSize")), prefetched=lambda c: (2.0, 0.1)
    )
    sim = simulate({**WIDE, "prefetchSize": 4}, load=lambda _: 60.0, model=model).run(300)
    assert made(sim) == ["prefetch-up", "prefetch-up"], sim.report()
    assert overlaid(sim, "prefetchSize") == (16,)
    assert recovered(sim), sim.report()
    assert_settled(sim)


@pytest.mark.slow
def test_low_latency_ends_compression_where_decoding_is_what_requests_wait_for() -> None:
    loading: Mapping[float, float] = {0.3: 1.2, 0.52: 0.7, 1.0: 0.01}
    model = EngineModel(tier_s=lambda c: loading[value(c, "compressionRatio")], decoding=0.9)
    sim = simulate({**WIDE, "prefetchSize": 64}, load=lambda _: 30.0, model=model).run(300)
    assert made(sim) == ["compression-down", "compression-down"], sim.report()
    ratio, host = overlaid(sim, "compressionRatio", "hostMemoryMb")
    assert (ratio, host > 256) == (1.0, True), "blocks are not encoded, and the host tier holds as many"
    assert recovered(sim), sim.report()
    assert_settled(sim)


def test_limited_memory_shrinks_the_cache_and_compresses_more() -> None:
    model = EngineModel(memory=lambda c: 0.5 + 0.4 * min(1.0, (value(c, "maxMemoryMb") or 200) / 200))
    sim = simulate({**WIDE, "compressionRatio": 0.52}, load=lambda _: 30.0, model=model).run(200)
    assert made(sim) == ["memory-relief"], sim.report()
    assert overlaid(sim, "maxMemoryMb", "compressionRatio") == (100, 0.32)
    assert states(sim)["memory"] == "Met"
    assert_settled(sim)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "tokens", "ahead"),
    [(60.0, 4096, 8), (300.0, 8192, 16), (520.0, 16384, 32)],
    ids=["below 100/s", "100 to 500/s", "500 to 2000/s"],
)
def test_each_load_phase_gets_its_tokens_and_its_prefetching(rate: float, tokens: int, ahead: int) -> None:
    """From the values of the phase before: half of both. What the phase needs is what the guides give it."""
    model = EngineModel(
        step_s=lambda rows: 0.002 + 0.0001 * rows,
        marginal_gain=None,
        hits=lambda c: min(0.8, 0.8 * value(c, "maxTokens") / tokens),
        tier_s=lambda c: max(0.0, 0.8 - 0.8 * value(c, "prefetchSize") / ahead),
        prefetched=lambda c: (2.0, 0.1),
    )
    before = {**WIDE, "maxTokens": tokens // 2, "prefetchSize": ahead // 2}
    sim = simulate(before, objectives={"hitRate": "70%"}, load=lambda _: rate, model=model).run(400)
    assert made(sim) == ["prefetch-up", "cache-quota-up", "cache-quota-up"], sim.report()
    held, fetched = overlaid(sim, "maxTokens", "prefetchSize")
    assert (tokens <= held <= 1.5 * tokens, fetched) == (True, ahead)
    assert states(sim)["hitRate"] == "Met"
    assert recovered(sim), sim.report()
    assert_settled(sim)


def test_the_page_of_the_playbooks_names_every_rule_and_alert() -> None:
    page = Path("docs/guides/playbooks.md").read_text()
    named = set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", page))
    assert named == {remedy.name for remedy in REMEDIES}
    listed = page.partition("## Alerts")[2].partition("\n## ")[0]
    alerts = re.findall(r"^\| ([A-Z]\w+)(?: \(boost\))? \| ", listed, re.MULTILINE)[1:]
    chart = yaml.safe_load(Path("charts/kvpilot/files/alerts.yaml").read_text())
    rules = {rule["alert"]: rule for group in chart["groups"] for rule in group["rules"]}
    assert len(alerts) == 8
    for name in alerts:
        assert ("kvpilot_boost" in rules[name]["labels"]) == (f"| {name} (boost) |" in listed)
