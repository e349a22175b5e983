"""The engine: generation, scheduling, stages, and how every request ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import xxhash

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract import metrics as names
from kvpilot_engine.ipc import messages
from kvpilot_engine.model.loading import load_model

Prompt = Callable[[int, int], list[int]]
Make = Callable[..., Any]


class Clock:
    """A clock that each reading moves on, so that every stage has a length."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@cache
def reference() -> Any:
    """The built-in model on transformers' own attention, and the ids it may generate."""
    model = load_model("builtin/tiny-llama", KVCacheConfig(dtype="float32", device="cpu"))
    model.module.set_attn_implementation("sdpa")
    assert model.allowed_ids is not None
    return model.module, torch.tensor(model.allowed_ids)


def is_greedy(prompt: list[int], answer: list[int]) -> bool:
    """Whether transformers alone, without a cache, would have chosen each of these tokens."""
    module, allowed = reference()
    with torch.inference_mode():
        logits = module(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return bool(answer) and allowed[logits[:, allowed].argmax(dim=-1)].tolist() == answer


def test_greedy_answers_are_those_of_transformers(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine(max_step_tokens=32)
    prompts = {"a": prompt(70, 1), "b": prompt(3, 2), "c": prompt(70, 1)[:50] + prompt(20, 3)}
    for name, ids in prompts.items():
        driver.submit(name, ids, 12)
    driver.run()
    for name, ids in prompts.items():
        assert is_greedy(ids, driver.tokens[name]), name
        end = driver.finished[name]
        assert (end.reason, end.prompt_tokens, end.output_tokens) == ("length", len(ids), 12)
    assert driver.finished["c"].cached_tokens == 48


def test_stages_add_up_to_the_whole_time(make_engine: Make, prompt: Prompt) -> None:
    clock = Clock()
    driver = make_engine(clock=clock, num_workers=2, batch_size=1, max_step_tokens=16)
    arrived = {}
    for i in range(5):
        driver.submit(str(i), prompt(40, i), 3)
        arrived[str(i)] = clock.now
    ended = {}
    while driver.engine.has_work:
        driver.step()
        for name in driver.finished:
            ended.setdefault(name, clock.now)
    stages = {stage.value for stage in names.Stage}
    for name, end in driver.finished.items():
        assert set(end.stages) <= stages
        assert sum(end.stages.values()) == pytest.approx(ended[name] - arrived[name], abs=0.004)
        assert end.stages["prefill"] > 0
        assert end.stages["decode"] > 0
        before = sum(end.stages.get(s, 0) for s in ("admission_wait", "tier_load", "batch_wait", "prefill"))
        assert end.first_token_s == pytest.approx(before)
    assert driver.finished["4"].stages["admission_wait"] > driver.finished["1"].stages["admission_wait"]
    assert driver.finished["1"].stages["batch_wait"] > driver.finished["0"].stages["batch_wait"]


def test_urgent_requests_first_then_by_arrival(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine(num_workers=1, batch_size=1)
    driver.submit("running", prompt(20, 0), 4)
    driver.step()
    for name, priority in (("late", 0), ("low", -1), ("later", 0), ("urgent", 9)):
        driver.submit(name, prompt(20, 1), 2, priority=priority)
    driver.run()
    assert list(driver.finished) == ["running", "urgent", "late", "later", "low"]


def test_rows_and_workers_bound_what_runs_at_once(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine(num_workers=5, batch_size=3)
    for i in range(12):
        driver.submit(str(i), prompt(20, i), 6)
    most_rows, rows_before = 0, 0
    while driver.engine.has_work:
        driver.step()
        rows = driver.engine.meter.rows_sum
        most_rows, rows_before = max(most_rows, rows - rows_before), rows
        if rows % 4 == 0:
            assert driver.gauge(names.REQUESTS_RUNNING) <= 5
    assert most_rows == 3
    assert len(driver.finished) == 12


def test_a_step_holds_no_more_tokens_than_allowed(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine(max_step_tokens=16, batch_size=2)
    driver.submit("a", prompt(100, 0), 1)
    steps = 0
    while driver.engine.has_work:
        driver.step()
        steps += 1
    assert steps == 7  # 6 chunks of 16, then the last 4 tokens


def test_more_decode_rows_than_step_tokens_take_turns(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine(max_step_tokens=16, batch_size=20, num_workers=20)
    for i in range(20):
        driver.submit(str(i), prompt(2, i), 12)
    driver.run()
    assert all(len(driver.tokens[str(i)]) == 12 for i in range(20))
    assert is_greedy(prompt(2, 7), driver.tokens["7"])


def test_same_missing_prefix_is_computed_once(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine(max_step_tokens=512)
    shared = prompt(256, 0)
    for i in range(6):
        driver.submit(str(i), shared + prompt(10, i + 1), 2)
    driver.run()
    assert [driver.finished[str(i)].cached_tokens for i in range(6)] == [0, *[256] * 5]


def test_stop_ids_end_the_answer_and_are_not_part_of_it(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine()
    driver.ask("whole", prompt(30, 5), 20)
    whole = driver.tokens["whole"]
    stop = next(token for at, token in enumerate(whole) if at > 2 and token not in whole[:at])
    end = driver.ask("a", prompt(30, 5), 20, stop_ids=[stop])
    assert end.reason == "stop"
    assert driver.tokens["a"] == whole[: whole.index(stop)]
    assert end.output_tokens == len(driver.tokens["a"])


def test_a_seed_gives_the_same_answer_in_any_company(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine()
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 11}
    driver.ask("alone", prompt(30, 0), 16, **options)
    for i in range(5):
        driver.submit(f"other{i}", prompt(25, i), 16, temperature=1.0)
    driver.submit("beside", prompt(30, 0), 16, **options)
    driver.submit("seed 12", prompt(30, 0), 16, **{**options, "seed": 12})
    driver.run()
    assert driver.tokens["alone"] == driver.tokens["beside"]
    assert driver.tokens["alone"] != driver.tokens["seed 12"]
    assert not is_greedy(prompt(30, 0), driver.tokens["alone"])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"prompt": []}, "prompt: is empty; at least one token is needed"),
    "ids": ({"prompt": [1, 999]}, "prompt: token ids must be 0 to 263, got 999"),
    "none new": ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, got 0"),
    "cold": ({"temperature": -1.0}, "temperature: must be at least 0, got -1.0"),
    "top_p": ({"top_p": 0.0}, "top_p: must be above 0 and at most 1, got 0.0"),
    "timeout": ({"timeout_s": 0.0}, "timeout_s: must be above 0, got 0.0"),
    "context": (
        {"max_new_tokens": 40_000},
        "prompt of 1 token and 40000 new ones make 40001; the model's context length is 32768",
    ),
    "pool": (
        {"max_new_tokens": 4096},
        "prompt of 1 token and 4096 new ones make 4097; the cache holds 4096 (the engine's max_tokens)",
    ),
}


def test_bad_requests_end_with_one_clear_line(make_engine: Make) -> None:
    driver = make_engine(max_tokens=4096)
    for name, (change, _) in BAD.items():
        driver.engine.submit(messages.Generate(**{"id": name, "prompt": [65], "max_new_tokens": 1, **change}))
    driver.run()
    for name, (_, reason) in BAD.items():
        end = "too_large" if name == "pool" else "invalid"
        assert (driver.finished[name].reason, driver.finished[name].message) == (end, reason)
    assert driver.ask("good", [65], 1).reason == "length"


def test_an_answer_without_a_limit_goes_on_to_what_the_cache_holds(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine(max_tokens=512)
    driver.engine.submit(messages.Generate(id="open", prompt=prompt(509), max_new_tokens=None))
    driver.engine.submit(messages.Generate(id="full", prompt=prompt(512), max_new_tokens=None))
    driver.run()
    assert (driver.finished["open"].reason, driver.finished["open"].output_tokens) == ("length", 3)
    assert driver.finished["full"].message == (
        "prompt of 512 tokens and 1 new ones make 513; the cache holds 512 (the engine's max_tokens)"
    )


def test_a_request_times_out_wherever_it_is(make_engine: Make, prompt: Prompt) -> None:
    clock = Clock()
    driver = make_engine(clock=clock, num_workers=1, batch_size=1)
    driver.submit("running", prompt(40, 0), 1000, timeout_s=5.0)
    driver.submit("waiting", prompt(40, 1), 5, timeout_s=5.0)
    driver.submit("patient", prompt(40, 2), 5, timeout_s=1000.0)
    driver.step()
    clock.now += 6.0
    driver.run()
    for name in ("running", "waiting"):
        assert (driver.finished[name].reason, driver.finished[name].message) == (
            "timeout",
            "timed out after 5 s",
        )
    assert driver.finished["running"].output_tokens == len(driver.tokens["running"]) > 0
    assert driver.finished["patient"].reason == "length"


def test_abort_frees_the_pages_of_a_request(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine(num_workers=2)
    for i in range(4):
        driver.submit(str(i), prompt(200, i), 1000)
    for _ in range(5):
        driver.step()
    for i in range(4):
        driver.engine.abort(str(i))
    driver.engine.abort("nobody")
    driver.run()
    assert {end.reason for end in driver.finished.values()} == {"cancelled"}
    cache = driver.engine.cache
    assert cache.pages_available == cache.pages_limit
    driver.engine.check_integrity()


def test_no_page_left_preempts_the_youngest_of_lowest_priority(make_engine: Make, prompt: Prompt) -> None:
    """3 x (100 + 45) tokens in a pool of 384: someone must give way, and nobody notices."""
    driver = make_engine(max_tokens=384)
    driver.submit("old", prompt(100, 0), 45)
    driver.submit("urgent", prompt(100, 1), 45, priority=5)
    driver.submit("young", prompt(100, 2), 45)
    driver.run()
    assert driver.counter(names.PREEMPTIONS_TOTAL) >= 1
    assert driver.finished["young"].stages["preempted"] > 0
    assert "preempted" not in driver.finished["urgent"].stages
    assert "preempted" not in driver.finished["old"].stages
    for i, name in enumerate(("old", "urgent", "young")):
        assert is_greedy(prompt(100, i), driver.tokens[name]), name
        assert driver.finished[name].output_tokens == 45


def test_many_waiting_requests_in_a_small_pool_all_finish(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine(max_tokens=512, num_workers=32, batch_size=16)
    for i in range(40):
        driver.submit(str(i), prompt(30 + 5 * (i % 20), i), 5 + i % 20, priority=i % 3)
    while driver.engine.has_work:
        driver.step()
        driver.engine.check_integrity()
    assert {end.reason for end in driver.finished.values()} == {"length"}
    assert all(len(driver.tokens[str(i)]) == 5 + i % 20 for i in range(40))


def test_a_prompt_without_pages_waits_for_admission(make_engine: Make, prompt: Prompt) -> None:
    """It is no wait for the batch, and nobody less urgent takes the pages that come free."""
    clock = Clock()
    driver = make_engine(clock=clock, max_tokens=512)
    driver.submit("runs", prompt(300, 0), 20)
    driver.step()
    driver.submit("urgent", prompt(350, 1), 2, priority=5)
    driver.submit("small", prompt(100, 2), 2)
    for _ in range(3):
        clock.now += 1.0
        driver.step()
        assert not driver.tokens["urgent"] and not driver.tokens["small"]
    assert (driver.gauge(names.REQUESTS_WAITING), driver.gauge(names.REQUESTS_RUNNING)) == (2, 1)
    driver.run()
    waited = driver.finished["urgent"].stages
    assert waited["admission_wait"] >= 3.0
    assert waited["batch_wait"] == 0.0
    assert driver.finished["small"].stages["admission_wait"] >= 3.0
    assert list(driver.finished) == ["runs", "urgent", "small"]


def test_sequence_waiting_for_pages_does_not_block_a_more_urgent_one(
    make_engine: Make, prompt: Prompt
) -> None:
    """The cached prefix of a sequence that waits for pages is held, and given up for a more urgent one."""
    driver = make_engine(max_tokens=640)
    driver.ask("before", prompt(330, 1), 1)
    driver.submit("runs", prompt(200, 0), 60)
    driver.step()
    driver.submit("short", prompt(330, 1) + prompt(250, 2), 2)
    driver.step()
    assert driver.gauge(names.REQUESTS_WAITING) == 1
    driver.submit("urgent", prompt(400, 3), 2, priority=9)
    driver.run()
    assert list(driver.finished) == ["before", "urgent", "runs", "short"]


def test_larger_quota_resumes_preempted_sequences(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine(max_tokens=512)
    driver.submit("first", prompt(200, 0), 80)
    driver.submit("second", prompt(200, 1), 80)
    for _ in range(50):
        driver.step()
    while not driver.counter(names.PREEMPTIONS_TOTAL):  # reading it takes as long as a few steps
        driver.step()
    before = len(driver.tokens["second"])
    driver.apply(max_tokens=4096)
    for _ in range(3):
        driver.step()
    assert len(driver.tokens["second"]) > before
    driver.run()
    assert "second" in driver.finished


def test_fewer_workers_than_there_are_slots_in_use_converge(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine(max_tokens=512)
    driver.submit("runs", prompt(300, 0), 20)
    driver.submit("short", prompt(300, 1), 2)
    driver.step()
    driver.apply(num_workers=1)
    driver.step()
    assert driver.gauge(names.CONFIG_CONVERGING) == 0
    driver.run()
    assert set(driver.finished) == {"runs", "short"}


def test_hits_exclude_a_preempted_sequences_own_pages(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine(max_tokens=512, max_step_tokens=64)
    driver.ask("before", prompt(161, 1), 1)
    driver.submit("runs", prompt(200, 0), 120)
    driver.step()
    driver.submit("short", prompt(161, 1) + prompt(200, 2), 2)
    driver.submit("young", prompt(100, 4), 60)
    driver.step()
    driver.submit("urgent", prompt(250, 3), 2, priority=9)
    driver.run()
    served = sum(end.cached_tokens for end in driver.finished.values())
    counted = driver.counter(names.HIT_TOKENS_TOTAL, "pool")
    assert counted == served
    assert all(driver.finished[name].cached_tokens == 0 for name in ("before", "runs", "young", "urgent"))
    assert driver.counter(names.QUERY_TOKENS_TOTAL) == 161 + 200 + 361 + 100 + 250


def test_blocks_that_were_loaded_for_a_prompt_without_pages_are_not_loaded_again(
    make_engine: Make, prompt: Prompt
) -> None:
    driver = make_engine(max_tokens=1024, host_memory_mb=64, use_compression=False, max_step_tokens=256)
    for i in range(8):
        driver.ask(f"fill{i}", prompt(513, i), 1)
        driver.settle()
    loaded = driver.counter(names.TIER_LOAD_BLOCKS_TOTAL, "host")
    for i in range(6):
        driver.submit(f"again{i}", prompt(513, i), 3)
    driver.run()
    assert [driver.finished[f"again{i}"].cached_tokens for i in range(6)] == [512] * 6
    assert driver.counter(names.TIER_LOAD_BLOCKS_TOTAL, "host") - loaded <= 6 * 4


def test_each_page_is_hashed_once_over_prefetch_lease_and_preemption(
    make_engine: Make, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_engine(max_tokens=512, host_memory_mb=16)
    for i in range(4):
        driver.ask(f"fill{i}", prompt(260, 90 + i), 1)
        driver.settle()
    assert driver.gauge(names.CACHED_PAGES, "host") > 0, "a prefetch has blocks to look for"
    hashed: Counter[bytes] = Counter()
    digest = xxhash.xxh3_128_digest

    def counting(data: bytes) -> bytes:
        hashed[data] += 1
        return digest(data)

    monkeypatch.setattr(xxhash, "xxh3_128_digest", counting)
    for i in range(2):
        driver.submit(str(i), prompt(200, i), 80)
    driver.run()
    assert driver.counter(names.PREEMPTIONS_TOTAL) > 0
    pages = {data: count for data, count in hashed.items() if len(data) == 16 + 4 * 16}
    assert len(pages) == 2 * (279 // 16), "the pages of 280 tokens, the last of which is never computed"
    assert set(pages.values()) == {1}
    assert sum(hashed.values()) - len(pages) == 2, "one root for each sequence"


def test_idle_engine_has_no_work(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine()
    assert not driver.engine.has_work
    assert driver.engine.step() == []
    driver.ask("a", prompt(20, 0), 2)
    assert not driver.engine.has_work


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_cuda_serves_the_same_way(make_engine: Make, prompt: Prompt, dtype: str) -> None:
    driver = make_engine(device="cuda", dtype=dtype)
    shared = prompt(64, 0)
    for i in range(6):
        driver.submit(str(i), shared + prompt(20, i + 1), 10)
    driver.run()
    assert {end.reason for end in driver.finished.values()} == {"length"}
    if dtype == "float32":
        assert is_greedy(shared + prompt(20, 4), driver.tokens["3"])
    sampled = driver.engine.sample("s")
    assert 0 < sampled.device_bytes < sampled.device_limit_bytes
