"""Relief of memory: the kind that is over, never below what requests need."""

from __future__ import annotations

from typing import Any

import pytest
from tests.operator.tuning.observations import NOW, context_of, curve, gauges, observe, three
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.assess.guards import DAY
from kvpilot_operator.tuning.context import Plan
from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.observation import MemoryUse
from kvpilot_operator.tuning.rules.memory import memory_emergency, memory_relief
from kvpilot_operator.tuning.state import BlockedValue, LongestRequest, TuningState

MIB = 1 << 20
GIB = 1024 * MIB
CALM_HOST = MemoryUse(0.3, 64 * GIB, 4 * GIB, 8 * GIB)
CALM_DEVICE = MemoryUse(0.5, 80 * GIB, 10 * GIB, 20 * GIB)
CONFIG = {"maxTokens": 65536, "hostMemoryMb": 8192, "useCompression": False}


def relief(state: TuningState | None = None, **changes: Any) -> Any:
    full = gauges(**changes)
    seen = context_of(observe(*three(gauges=full), config=CONFIG))
    return memory_relief(seen, state or TuningState(), Plan())


def test_relief_waits_for_a_rollout_since_its_canary_must_stay() -> None:
    rolling = observe(*three(gauges=gauges(memory_ratio=0.9)), rolling_out=True)
    decision = decide(rolling, TuningState(last_generation=1), policy_of(), NOW)
    assert (decision.records, decision.state.change) == ((), None)
    assert [(hold.reason, hold.message) for hold in decision.state.holds] == [
        ("RollingOut", "the workload replaces its pods")
    ]


def test_device_over_its_limit_shrinks_the_pool_and_not_the_host_tier() -> None:
    full = MemoryUse(0.9, 80 * GIB, 40 * GIB, 40 * GIB)
    found = relief(memory_ratio=0.9, host=CALM_HOST, device=full, longest_request_tokens=3000.0)
    (change,) = found.values
    assert (change.knob, change.before) == ("maxTokens", 65536)
    freed = 40 * GIB * (1 - change.after / 65536)
    assert 0.9 - freed / (80 * GIB) == pytest.approx(0.72, abs=0.01)
    assert found.predicted_gain == pytest.approx(freed / (80 * GIB) / 0.9)
    assert found.message.startswith("device memory was at 90% of its limit, 80% is allowed")


def test_host_over_its_limit_shrinks_the_host_tier_and_not_the_pool() -> None:
    full = MemoryUse(0.85, 64 * GIB, 8 * GIB, 8 * GIB)
    found = relief(memory_ratio=0.85, host=full, device=CALM_DEVICE)
    assert [change.knob for change in found.values] == ["hostMemoryMb"]


def test_relief_says_how_much_of_the_step_rate_it_leaves_at_least() -> None:
    device = MemoryUse(0.9, 80 * GIB, 40 * GIB, 40 * GIB)
    host = MemoryUse(0.85, 64 * GIB, 8 * GIB, 8 * GIB)
    pool = relief(memory_ratio=0.9, host=CALM_HOST, device=device)
    part = pool.values[0].after / 65536
    assert (pool.measure, pool.ratio) == ("memory", part), "rows in proportion, where no curve is known"
    assert relief(memory_ratio=0.85, host=host, device=CALM_DEVICE).ratio == 1.0, "a tier holds no rows"


def test_hits_that_relief_costs_slow_the_steps_as_well() -> None:
    """4 rows of 100 in steps of 0.04 s, half of it prefill; 80% of the tokens are hits."""
    full = MemoryUse(0.9, 80 * GIB, 40 * GIB, 40 * GIB)
    shown = gauges(memory_ratio=0.9, host=CALM_HOST, device=full, curve=curve(0.016, 0.001))
    pods = three(gauges=shown, rows=4, row_rate=100.0, hit=0.8)
    found = memory_relief(context_of(observe(*pods, config=CONFIG)), TuningState(), Plan())
    assert not isinstance(found, tuple)
    part = found.values[0].after / 65536
    computed, rows = (1 - part * 0.8) / 0.2, 4 * part
    step_s = 0.016 + 0.001 * rows + 0.02 * computed * rows / 4
    assert found.ratio == pytest.approx(rows / step_s / 100.0)


def test_the_pool_never_falls_below_the_longest_request_of_the_last_day() -> None:
    full = MemoryUse(0.99, 80 * GIB, 20 * GIB, 20 * GIB)
    found = relief(memory_ratio=0.99, host=CALM_HOST, device=full, longest_request_tokens=60_000.0)
    assert found.values[0].after == 60_032, "in whole blocks"
    found = relief(memory_ratio=0.99, host=CALM_HOST, device=full, longest_request_tokens=65_536.0)
    assert found == ("AtBound", "maxTokens is 65536, and requests need up to 65536 tokens")


def test_the_budget_never_falls_below_the_longest_request_of_the_last_day() -> None:
    full = MemoryUse(0.99, 1000 * MIB, 400 * MIB, 400 * MIB)
    found = relief(memory_ratio=0.99, host=full, longest_request_tokens=3072.0, token_bytes=0.125 * MIB)
    assert (found.values[0].knob, found.values[0].after) == ("maxMemoryMb", 384)


FULL_HOST = MemoryUse(0.99, 1000 * MIB, 400 * MIB, 400 * MIB)
FULL_DEVICE = MemoryUse(0.99, 80 * GIB, 20 * GIB, 20 * GIB)


@pytest.mark.parametrize(
    "full", [{"host": FULL_HOST}, {"host": CALM_HOST, "device": FULL_DEVICE}], ids=["host", "device"]
)
def test_no_quota_is_cut_below_a_longest_request_that_nobody_exports(full: dict[str, Any]) -> None:
    absent = ("MetricAbsent", "not every engine exports kvpilot_longest_request_tokens")
    assert relief(memory_ratio=0.99, longest_request_tokens=None, **full) == absent
    assert relief(memory_ratio=0.99, longest_request_tokens=0.0, **full).values, "nothing came in for a day"


def test_a_tier_that_no_request_needs_is_cut_without_it() -> None:
    full = MemoryUse(0.85, 64 * GIB, 8 * GIB, 8 * GIB)
    found = relief(memory_ratio=0.85, host=full, device=CALM_DEVICE, longest_request_tokens=None)
    assert [change.knob for change in found.values] == ["hostMemoryMb"]


@pytest.mark.parametrize(
    ("token_bytes", "rejected"),
    [
        (None, ("MetricAbsent", "no engine exports kvpilot_cached_pages")),
        (0.0, ("NotEffective", "no pool holds a page that would show what a token takes")),
    ],
)
def test_the_budget_is_not_cut_while_nobody_knows_what_a_request_takes(
    token_bytes: float | None, rejected: tuple[str, str]
) -> None:
    full: dict[str, Any] = {"memory_ratio": 0.99, "host": FULL_HOST, "token_bytes": token_bytes}
    assert relief(**full, longest_request_tokens=3072.0) == rejected
    assert relief(**full, longest_request_tokens=0.0).values


def longest_after(*seen: tuple[float, float | None]) -> tuple[LongestRequest, ...]:
    """What is remembered after engines reported such longest requests (s after the first, tokens)."""
    state = TuningState(last_generation=1)
    for at, tokens in seen:
        observed = observe(*three(gauges=gauges(longest_request_tokens=tokens)), at=NOW + at)
        state = decide(observed, state, policy_of(), NOW + at).state
    return state.longest


def test_an_engine_that_restarts_makes_nobody_forget_its_longest_request() -> None:
    assert longest_after((0, 6000.0)) == (LongestRequest(6016),), "in whole blocks"
    known = longest_after((0, 6000.0), (60, 0.0), (120, 500.0))
    assert known == (LongestRequest(6016, NOW + 60 + DAY), LongestRequest(512))
    state = TuningState(longest=known)
    found = relief(state, memory_ratio=0.99, host=CALM_HOST, device=FULL_DEVICE, longest_request_tokens=500.0)
    assert found.values[0].after > 6016, "as small as the excess asks for"
    state = TuningState(longest=(LongestRequest(60_032, NOW + DAY),))
    found = relief(state, memory_ratio=0.99, host=CALM_HOST, device=FULL_DEVICE, longest_request_tokens=500.0)
    assert found.values[0].after == 60_032


def test_a_longest_request_is_remembered_for_a_day_and_while_nobody_reports_any() -> None:
    fallen = [(0, 6000.0), (60, 0.0)]
    assert longest_after(*fallen, (60 + DAY - 1, 0.0))
    assert longest_after(*fallen, (60 + DAY, 0.0)) == ()
    assert longest_after(*fallen, (60 + DAY, None)), "an engine that does not say clears nothing"
    assert longest_after(*fallen, (120, 7000.0)) == (LongestRequest(7040),), "the longer one counts for both"


def test_few_longest_requests_are_remembered_and_none_too_short() -> None:
    falling = [(60.0 * n, 10_000.0 - 1000 * n) for n in range(8)]
    known = longest_after(*falling)
    assert [item.tokens for item in known] == [10_112, 5120, 4096, 3072]
    # The first was last reported at 0 s; it stands for those of up to 300 s as well.
    assert [item.until for item in known] == [NOW + DAY + at for at in (300, 360, 420)] + [0.0]


def test_requests_that_stay_alike_write_nothing() -> None:
    state = TuningState(last_generation=1, longest=(LongestRequest(6016),))
    seen = observe(*three(gauges=gauges(longest_request_tokens=6000.0)))
    assert decide(seen, state, policy_of(), NOW).state.longest == state.longest


def test_an_emergency_that_freed_nothing_is_not_repeated() -> None:
    full = context_of(observe(*three(gauges=gauges(memory_ratio=0.97)), config={"batchSize": 16}))
    found = memory_emergency(full, TuningState(), Plan())
    assert not isinstance(found, tuple)
    assert (found.values[0].before, found.values[0].after) == (16, 8)
    blocked = TuningState(blocked_values=(BlockedValue("batchSize", 8, full.now + 60),))
    assert memory_emergency(full, blocked, Plan()) == (
        "ValueBlocked",
        "batchSize 8 freed no memory a short while ago",
    )
