"""Overload, time limits and disconnects, and their metrics."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from tests.waiting import eventually

from kvpilot_engine.contract import metrics as names

pytestmark = pytest.mark.timeout(300)  # the first test of a session waits until an engine has started

MODEL = "builtin/tiny-llama"
# Keeps a worker busy for longer than any wait of these tests, and fits into their cache.
LONG = {"prompt": "Slow", "max_tokens": 12_000}


def outcome(served: Any, name: str) -> float:
    return float(served.metric("kvpilot_requests_total", outcome=name))


@pytest.fixture
def narrow(served: Any) -> Iterator[Any]:
    """One worker and a queue of two."""
    served.patch(numWorkers=1, maxQueue=2)
    yield served
    served.patch(numWorkers=8, maxQueue=64, requestTimeoutS=60)


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_of_the_client_frees_its_pages(served: Any, stream: bool) -> None:
    cancelled = outcome(served, "cancelled")
    body = {**LONG, "stream": stream}
    with httpx.Client(base_url=served.url) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.3)
    eventually(lambda: outcome(served, "cancelled") == cancelled + 1, why=lambda: "not counted as cancelled")
    served.settle()


@contextmanager
def busy(served: Any) -> Iterator[None]:
    """A long answer holds the only worker; its client leaves at the end."""
    with served.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
        chunks = answer.iter_bytes()  # kept: the connection is closed with it
        next(chunks)
        yield


def test_full_queue_sheds_with_retry_after_and_serves_the_others(narrow: Any) -> None:
    before = outcome(narrow, "shed")

    def ask(number: int) -> httpx.Response:
        with httpx.Client(base_url=narrow.url, timeout=60.0) as client:
            return client.post("/v1/completions", json={"prompt": f"Ask {number}", "max_tokens": 4})

    with ThreadPoolExecutor(12) as pool:
        with busy(narrow):
            asked = [pool.submit(ask, number) for number in range(12)]
            eventually(lambda: sum(each.done() for each in asked) == 10, why=lambda: "not 10 of 12 refused")
        answers = [each.result() for each in asked]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert sorted(answer.status_code for answer in answers) == [200] * 2 + [429] * 10
    assert 1 <= int(refused[0].headers["retry-after"]) <= 30
    assert refused[0].json()["error"]["message"].startswith("overloaded: 2 requests wait and max_queue is 2")
    assert outcome(narrow, "shed") == before + 10


def test_request_beyond_its_time_limit_is_504(narrow: Any) -> None:
    timeouts = outcome(narrow, "timeout")
    narrow.patch(requestTimeoutS=0.2)
    answer = narrow.http.post("/v1/completions", json=LONG)
    assert answer.status_code == 504, answer.text
    assert answer.json()["error"]["code"] == "timeout"
    assert "0.2" in answer.json()["error"]["message"]
    assert outcome(narrow, "timeout") == timeouts + 1


def test_stream_beyond_its_time_limit_ends_with_an_error_event(narrow: Any) -> None:
    narrow.patch(requestTimeoutS=0.3)
    with pytest.raises(openai.APIError, match=r"0\.3"):
        for _ in narrow.openai.completions.create(model=MODEL, stream=True, **LONG):
            pass


async def test_urgent_request_overtakes_the_queue(narrow: Any) -> None:
    """It is answered while those before it, which take long, have yet to be."""
    narrow.patch(maxQueue=64)

    async def waiting(requests: int) -> None:
        def counted() -> float:
            return float(narrow.metric("kvpilot_requests_waiting"))

        await asyncio.to_thread(
            eventually, lambda: counted() == requests, why=lambda: f"{counted()} wait, not {requests}"
        )

    async with httpx.AsyncClient(base_url=narrow.url, timeout=60.0) as client:

        def ask(body: dict[str, Any]) -> asyncio.Task[httpx.Response]:
            return asyncio.create_task(client.post("/v1/completions", json=body))

        with busy(narrow):
            ordinary = [ask(LONG) for _ in range(3)]
            await waiting(3)
            urgent = ask({"prompt": "Urgent", "max_tokens": 4, "priority": 10})
            await waiting(4)
        assert (await urgent).status_code == 200
        assert not any(task.done() for task in ordinary)
        for task in ordinary:
            task.cancel()
        await asyncio.gather(*ordinary, return_exceptions=True)


def test_incomplete_request_does_not_disturb_others(served: Any) -> None:
    with socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1]))) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert served.http.get("/healthz").status_code == 200


def test_every_metric_of_the_contract_is_exposed_from_the_start(served: Any) -> None:
    text = served.http.get("/metrics").text
    spelled = [
        value for key, value in vars(names).items() if key.isupper() and str(value).startswith("kvpilot_")
    ]
    missing = [name for name in spelled if f"\n# TYPE {name} " not in text]
    assert missing == []
    for stage in names.Stage:
        assert f'kvpilot_stage_seconds_bucket{{le="0.05",stage="{stage}"}}' in text
    for each in names.Outcome:
        assert f'kvpilot_requests_total{{outcome="{each}"}}' in text
    for edge in names.EDGES_S:
        assert f'kvpilot_request_seconds_bucket{{le="{edge:.12g}' in text
    assert "_created" not in text


def test_counters_follow_a_request(served: Any) -> None:
    served.settle()

    def read() -> dict[str, float]:
        page = served.page()
        return {
            "arrivals": page.metric("kvpilot_arrivals_total"),
            "ok": page.metric("kvpilot_requests_total", outcome="ok"),
            "requests": page.metric("kvpilot_request_seconds_count"),
            "first": page.metric("kvpilot_first_token_seconds_count"),
            "gaps": page.metric("kvpilot_inter_token_seconds_count"),
            "decode": page.metric("kvpilot_stage_seconds_count", stage="decode"),
            "output": page.metric("kvpilot_output_tokens_total"),
            "queried": page.metric("kvpilot_prefix_query_tokens_total"),
        }

    before = read()
    served.http.post("/v1/completions", json={"prompt": "Count me, please", "max_tokens": 10})
    served.settle()
    grown = {name: value - before[name] for name, value in read().items()}
    assert grown == {
        "arrivals": 1, "ok": 1, "requests": 1, "first": 1, "gaps": 9, "decode": 1, "output": 10,
        "queried": 16,
    }  # fmt: skip


def test_memory_is_measured_against_the_limit(served: Any) -> None:
    page = served.page()
    used, limit = (page.metric(f"kvpilot_memory_{what}", kind="host") for what in ("bytes", "limit_bytes"))
    assert 50e6 < used < 3e9
    assert page.metric("kvpilot_memory_ratio", kind="host") == pytest.approx(used / limit)
