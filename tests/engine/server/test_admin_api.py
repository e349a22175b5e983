"""The admin API: authorisation, refusals, and changes under load."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
from tests.waiting import eventually

from kvpilot_engine.contract import CONTRACT_VERSION, AdminConfig, ApplyReport
from kvpilot_engine.contract.config import QUIET

pytestmark = pytest.mark.timeout(300)  # the first test of a session waits until an engine has started


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic abc"}])
def test_request_without_the_token_reads_and_changes_nothing(served: Any, header: dict[str, str]) -> None:
    with httpx.Client(base_url=served.admin_url) as client:
        for answer in (
            client.get("/admin/config", headers=header),
            client.patch("/admin/config", headers=header),
        ):
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_token"
            assert answer.headers["www-authenticate"] == "Bearer"


def test_admin_routes_are_not_on_the_main_port_nor_metrics_on_the_admin_port(served: Any) -> None:
    assert served.http.get("/admin/config").status_code == 404
    assert served.admin.get("/metrics").status_code == 404


def test_get_returns_the_live_configuration(served: Any) -> None:
    live = AdminConfig.model_validate_json(served.admin.get("/admin/config").text, context=QUIET)
    assert live.contract_version == CONTRACT_VERSION
    assert live.model == "builtin/tiny-llama"
    assert (live.config.num_workers, live.config.max_tokens) == (8, 16384)
    assert "numWorkers" in live.knobs
    assert "useQuantization" not in live.knobs
    assert live.ceilings["maxTokens"] >= 16384


def test_change_takes_effect_and_is_read_back(served: Any) -> None:
    before = served.admin.get("/admin/config").json()
    body = {"epoch": before["epoch"], "generation": 41, "values": {"numWorkers": 12, "prefetch_size": 6}}
    report = ApplyReport.model_validate_json(served.admin.patch("/admin/config", json=body).text)
    assert report.generation == 41
    assert sorted(report.changed) == ["numWorkers", "prefetchSize"]
    after = served.admin.get("/admin/config").json()
    assert (after["generation"], after["config"]["numWorkers"], after["config"]["prefetchSize"]) == (
        41,
        12,
        6,
    )
    again = served.admin.patch("/admin/config", json=body).json()
    assert again["changed"] == []
    served.patch(numWorkers=8, prefetchSize=4)


@pytest.mark.parametrize(
    ("change", "status", "code", "message"),
    [
        ({"epoch": 0}, 409, "stale_epoch", "epoch"),
        ({"values": {"dtype": "float16"}}, 409, "cold", "restart"),
        ({"values": {"numWorkers": 0}}, 400, "invalid", "numWorkers: Input should be greater"),
        ({"values": {"numWorkers": 500}}, 400, "invalid", "128"),
        ({"values": {"bogus": 1}}, 400, "invalid", "bogus"),
        ({"values": {"maxTokens": 10**30}}, 400, "invalid", "maxTokens: got 1000"),
        ({"values": {"prefetchSize": 8, "numWorkers": 0}}, 400, "invalid", "numWorkers"),
        ({"generation": -1}, 400, None, "generation: should be greater than or equal to 0, got -1"),
        ({"bogus": 1}, 400, None, "bogus: unknown parameter"),
    ],
)
def test_refused_change_changes_nothing(
    served: Any, change: dict[str, Any], status: int, code: str | None, message: str
) -> None:
    before = served.admin.get("/admin/config").json()
    body = {"epoch": before["epoch"], "generation": 99, "values": {}, **change}
    answer = served.admin.patch("/admin/config", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code
    assert message in answer.json()["error"]["message"]
    assert served.admin.get("/admin/config").json() == before


async def test_no_request_fails_during_configuration_changes(served: Any) -> None:
    client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    failures: list[str] = []
    running = True

    served_now = asyncio.Condition()
    done = 0

    async def user(number: int) -> None:
        nonlocal done
        while running:
            try:
                answer = await client.completions.create(
                    model="builtin/tiny-llama", prompt=f"User {number} " * 40, max_tokens=8
                )
                assert answer.usage is not None
                assert answer.usage.completion_tokens == 8
            except Exception as error:
                failures.append(repr(error))
            async with served_now:
                done += 1
                served_now.notify_all()

    users = [asyncio.create_task(user(i)) for i in range(8)]
    changes: tuple[dict[str, Any], ...] = (
        {"numWorkers": 2}, {"batchSize": 2}, {"maxTokens": 2048}, {"cacheStrategy": "fifo"},
        {"batchSize": 16}, {"hostMemoryMb": 32, "compressionRatio": 0.52}, {"maxStepTokens": 128},
        {"cacheStrategy": "lfu"},
        {"maxTokens": 16384, "numWorkers": 8, "batchSize": 8, "cacheStrategy": "lru", "hostMemoryMb": 0,
         "maxStepTokens": 512},
    )  # fmt: skip
    for values in changes:
        await asyncio.to_thread(served.patch, **values)
        async with served_now:
            enough = done + 4
            await served_now.wait_for(lambda enough=enough: done >= enough)
    running = False
    await asyncio.gather(*users)
    await client.close()
    assert failures == []


def test_generation_in_metrics_follows_the_change(served: Any) -> None:
    report = served.patch(prefetchSize=4)
    eventually(lambda: served.metric("kvpilot_config_generation") == report["generation"])
