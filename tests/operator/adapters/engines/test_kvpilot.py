"""The admin adapter against a small HTTP server that keeps to the contract, or does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from kvpilot_engine.contract import AdminConfig, ConfigPatch, KVCacheConfig
from kvpilot_engine.contract.config import QUIET
from kvpilot_operator.adapters.engines.kvpilot import EngineAdmin, differing
from kvpilot_operator.ports import EngineCallError
from kvpilot_operator.status.snapshot import Replica

BASE = {"numWorkers": 4, "batchSize": 2, "dtype": "float32", "cacheStrategy": "lru"}


@dataclass
class Engine:
    """An engine's admin API; ``forgets`` makes it accept a change and go on as before."""

    config: KVCacheConfig = field(default_factory=lambda: KVCacheConfig.model_validate(BASE))
    generation: int = 1
    epoch: int = 0
    contract: int = 1
    forgets: bool = False
    tokens: list[str] = field(default_factory=list)
    answer: web.Response | None = None

    def described(self) -> dict[str, Any]:
        live = AdminConfig(
            contract_version=self.contract, version="0.1.0", instance="i1", model="m",
            generation=self.generation, epoch=self.epoch, config=self.config, converging=False,
            ceilings={"maxTokens": 8192},
            knobs=["numWorkers"], not_yet_effective=[],
        )  # fmt: skip
        return live.model_dump(mode="json", by_alias=True)

    async def get(self, request: web.Request) -> web.Response:
        self.tokens.append(request.headers["Authorization"])
        return self.answer or web.json_response(self.described())

    async def patch(self, request: web.Request) -> web.Response:
        patch = ConfigPatch.model_validate(await request.json())
        if patch.epoch < self.epoch:
            return web.json_response({"error": {"message": f"epoch {patch.epoch} is over"}}, status=409)
        if patch.values.get("numWorkers") == 0:
            return web.json_response({"error": {"message": "numWorkers: at least 1, got 0"}}, status=400)
        if not self.forgets:
            self.config, self.generation = self.config.updated(patch.values), patch.generation
            self.epoch = patch.epoch
        return web.json_response(
            {"generation": self.generation, "epoch": self.epoch, "changed": ["numWorkers"], "blocksKept": 3,
             "blocksLost": 0, "converging": False}
        )  # fmt: skip


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
async def replica(engine: Engine) -> AsyncIterator[Replica]:
    app = web.Application()
    app.add_routes([web.get("/admin/config", engine.get), web.patch("/admin/config", engine.patch)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    yield Replica("u1", "chat-1", True, f"http://127.0.0.1:{port}", "secret")
    await runner.cleanup()


@pytest.fixture
async def admin() -> AsyncIterator[EngineAdmin]:
    async with EngineAdmin(read_timeout_s=60.0) as adapter:
        yield adapter


async def test_describe_reads_the_live_configuration_with_the_token(
    admin: EngineAdmin, replica: Replica, engine: Engine
) -> None:
    live = await admin.describe(replica)
    assert (live.generation, live.config.num_workers, live.ceilings) == (1, 4, {"maxTokens": 8192})
    assert engine.tokens == ["Bearer secret"]


async def test_apply_changes_and_reads_back(admin: EngineAdmin, replica: Replica, engine: Engine) -> None:
    report = await admin.apply(replica, ConfigPatch(epoch=1, generation=2, values={"numWorkers": 8}))
    assert (report.generation, report.changed) == (2, ["numWorkers"])
    assert (engine.config.num_workers, engine.generation, engine.epoch) == (8, 2, 1)


async def test_an_engine_that_runs_something_else_afterwards_is_an_error(
    admin: EngineAdmin, replica: Replica, engine: Engine
) -> None:
    engine.forgets = True
    with pytest.raises(EngineCallError) as caught:
        await admin.apply(replica, ConfigPatch(epoch=1, generation=2, values={"numWorkers": 8}))
    assert caught.value.code == "refused"
    assert str(caught.value) == "chat-1 accepted generation 2 and runs 1; different: numWorkers"


async def test_an_older_epoch_is_shown_apart(admin: EngineAdmin, replica: Replica, engine: Engine) -> None:
    engine.epoch = 7
    with pytest.raises(EngineCallError, match="chat-1 answered 409: epoch 6 is over") as caught:
        await admin.apply(replica, ConfigPatch(epoch=6, generation=2, values={}))
    assert caught.value.code == "stale_epoch"


async def test_a_refusal_carries_the_engine_s_own_words(admin: EngineAdmin, replica: Replica) -> None:
    with pytest.raises(EngineCallError, match="answered 400: numWorkers: at least 1, got 0") as caught:
        await admin.apply(replica, ConfigPatch(epoch=1, generation=2, values={"numWorkers": 0}))
    assert caught.value.code == "refused"


@pytest.mark.parametrize(
    ("answer", "message", "code"),
    [
        (
            web.Response(text="<html>gateway</html>"),
            "answered something else than AdminConfig: body: Invalid JSON",
            "refused",
        ),
        (web.Response(status=401, text='{"detail":"no token"}'), "answered 401: no token", "unauthorized"),
        (web.Response(status=403, text='{"detail":"off"}'), "answered 403: off", "unauthorized"),
        (web.Response(status=307, headers={"Location": "http://elsewhere/"}), "answered 307", "refused"),
    ],
)
async def test_other_answers_are_refusals(
    admin: EngineAdmin, replica: Replica, engine: Engine, *, answer: web.Response, message: str, code: str
) -> None:
    engine.answer = answer
    with pytest.raises(EngineCallError, match=message) as caught:
        await admin.describe(replica)
    assert caught.value.code == code


@pytest.mark.parametrize("contract", [0, 1])
async def test_engines_of_this_contract_and_the_one_before_are_understood(
    admin: EngineAdmin, replica: Replica, engine: Engine, contract: int
) -> None:
    engine.contract = contract
    assert (await admin.describe(replica)).contract_version == contract


async def test_an_engine_of_a_newer_contract_is_refused(
    admin: EngineAdmin, replica: Replica, engine: Engine
) -> None:
    engine.contract = 2
    with pytest.raises(EngineCallError, match="chat-1 speaks contract 2, this operator knows 0 and 1"):
        await admin.describe(replica)


async def test_nobody_there_is_unreachable(admin: EngineAdmin) -> None:
    with pytest.raises(EngineCallError, match="chat-9 cannot be reached") as caught:
        await admin.describe(Replica("u9", "chat-9", True, "http://127.0.0.1:9", "t"))
    assert caught.value.code == "unreachable"
    with pytest.raises(EngineCallError, match="chat-9 has no address yet"):
        await admin.describe(Replica("u9", "chat-9", False, "", "t"))


async def test_an_engine_that_hangs_is_unreachable_in_time() -> None:
    asked_enough = asyncio.Event()

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked_enough.wait()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with EngineAdmin(read_timeout_s=0.2) as admin:
            with pytest.raises(EngineCallError, match=r"did not answer within 0\.2 s") as caught:
                await admin.describe(Replica("u1", "chat-1", True, f"http://127.0.0.1:{port}", "t"))
        asked_enough.set()
    assert caught.value.code == "unreachable"


def test_cold_fields_and_values_above_a_ceiling_do_not_differ(engine: Engine) -> None:
    live = AdminConfig.model_validate(engine.described(), context=QUIET)
    found = differing(
        live, {"numWorkers": 8, "batchSize": 2, "maxTokens": 16384, "device": "cuda", "dtype": "float32"}
    )
    assert found == ("numWorkers",)
    with pytest.raises(EngineCallError, match="not a configuration"):
        differing(live, {"numWorkers": 0})
