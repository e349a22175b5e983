"""Alertmanager's payloads, over HTTP, against a cluster in memory."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from kvpilot_operator.cluster.alerts import AlertReceiver
from kvpilot_operator.reconcile.reconciler import Reconciliation
from kvpilot_operator.status.overrides import Overrides
from kvpilot_operator.status.snapshot import Key, Snapshot
from kvpilot_operator.tuning.decision import Decision, Objective
from kvpilot_operator.tuning.observation import (
    Boost,
    Counts,
    Gauges,
    Observation,
    ObservedReplica,
    Sample,
    SourceProblem,
)
from kvpilot_operator.tuning.pace import PACES
from kvpilot_operator.tuning.policy import Objectives, Policy, Scaling
from kvpilot_operator.tuning.state import TuningState

CHAT = Key("team-a", "chat")
NOW = 1_000_000.0
POLICY = Policy(Objectives("request", {}, 0, 0, 0, 1, 1), "Auto", PACES["Fast"], {}, Scaling(1, 4))
SLOW = Objective("p95", 0.95, 0.7, 0.96, "Met")
FINE = Objective("p95", 0.95, 0.99, 0.99, "Met")


@dataclass
class World:
    """One resource with two replicas, its boosts, and what a fresh look finds."""

    objectives: tuple[Objective, ...] = (SLOW,)
    replicas: int = 2
    starting: int = 0
    policy: Policy = POLICY
    problem: str = ""
    arrivals: float = 0.0
    away: bool = False
    paused: dict[str, Any] = field(default_factory=dict)
    boosts: dict[str, Boost] = field(default_factory=dict)
    events: list[tuple[str, str]] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)
    results: int = 0
    woken: int = 0
    now: float = NOW

    async def read(self, key: Key) -> Snapshot | None:
        if self.away:
            raise ConnectionError("the API server is away")
        if key != CHAT:
            return None
        return Snapshot(
            CHAT,
            {"metadata": {"uid": "u"}},
            self.replicas,
            (),
            None,
            overrides=Overrides(boosts=tuple(self.boosts.values())),
        )

    async def result(self, key: Key) -> Reconciliation | None:
        self.results += 1
        snapshot = await self.read(key)
        if snapshot is None:
            return None
        sample = None if self.problem else Sample({"short": Counts(arrivals=self.arrivals)}, Gauges(), 0, 10)
        serving = range(self.replicas - self.starting)
        pods = tuple(ObservedReplica(f"p{n}", f"chat-{n}", True, sample=sample) for n in serving)
        problem = SourceProblem("MetricsUnavailable", self.problem) if self.problem else None
        seen = Observation(self.now, pods, {}, None, self.replicas, metrics_problem=problem, **self.paused)
        decision = Decision(TuningState(), objectives=() if self.problem else self.objectives)
        return Reconciliation(CHAT, snapshot, self.policy, seen, decision)

    def boost_name(self, key: Key, fingerprint: str) -> str:
        return f"{key.name}-alert-{fingerprint}"

    async def boost(self, snapshot: Snapshot, fingerprint: str, minimum: int, until: float, why: str) -> str:
        name = self.boost_name(snapshot.key, fingerprint)
        self.boosts[name] = Boost(name, minimum, until)
        return name

    async def event(self, snapshot: Snapshot, kind: str, reason: str, message: str) -> None:
        self.events.append((reason, message))

    async def wake(self) -> None:
        self.woken += 1


@pytest.fixture
def world() -> World:
    return World()


Send = Callable[..., Awaitable[tuple[int, Any]]]


@pytest.fixture
async def send(world: World, tmp_path: Path) -> AsyncIterator[Send]:
    token = tmp_path / "token"
    token.write_text("secret\n")
    receiver = AlertReceiver(
        world, world.result, world.wake, world.counted.append, token_file=token, ttl_s=600, resolved_s=60,
        clock=lambda: world.now,
    )  # fmt: skip
    runner = web.AppRunner(receiver.app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/alerts"
    async with aiohttp.ClientSession() as session:

        async def post(body: Any, authorization: str | None = "Bearer secret") -> tuple[int, Any]:
            headers = {"Authorization": authorization} if authorization else {}
            data = body if isinstance(body, str) else json.dumps(body)
            async with session.post(url, data=data, headers=headers) as answer:
                return answer.status, (await answer.json())

        yield post
    await runner.cleanup()


def alert(status: str = "firing", fingerprint: str = "f1", **labels: str) -> dict[str, Any]:
    given = {"alertname": "CriticalLatency", "namespace": "team-a", "kvpilot_name": "chat", **labels}
    return {
        "status": status,
        "labels": given,
        "startsAt": "T1",
        "fingerprint": fingerprint,
        "generatorURL": "x",
    }


def payload(*alerts: dict[str, Any], truncated: int = 0) -> dict[str, Any]:
    return {"version": "4", "groupKey": "g", "truncatedAlerts": truncated, "alerts": list(alerts), "new": 1}


async def test_a_verified_alert_becomes_one_expiring_boost_and_brings_the_look_forward(
    world: World, send: Send
) -> None:
    assert await send(payload(alert())) == (200, {"results": ["boosted"]})
    (boost,) = world.boosts.values()
    assert (boost.min_replicas, boost.expires_at) == (3, NOW + 600)
    assert world.results == 2, "one to verify, one to act"
    ((reason, message),) = world.events
    assert reason == "AlertBoost"
    assert message.startswith("Alert CriticalLatency: at least 3 replicas until ")


async def test_the_same_alert_again_refreshes_its_boost_and_never_raises_it(world: World, send: Send) -> None:
    await send(payload(alert()))
    world.replicas = 3
    assert (await send(payload(alert())))[1] == {"results": ["duplicate"]}
    world.now += 400
    assert (await send(payload(alert())))[1] == {"results": ["refreshed"]}
    (boost,) = world.boosts.values()
    assert (boost.min_replicas, boost.expires_at) == (3, NOW + 1000)
    assert len(world.events) == 1


async def test_resolved_lets_the_boost_expire_soon(world: World, send: Send) -> None:
    await send(payload(alert()))
    assert (await send(payload(alert("resolved"))))[1] == {"results": ["shortened"]}
    (boost,) = world.boosts.values()
    assert boost.expires_at == NOW + 60
    assert (await send(payload(alert("resolved", "f2"))))[1] == {"results": ["resolved"]}


async def test_an_alert_is_a_hint_and_measurements_decide(world: World, send: Send) -> None:
    world.objectives = (
        FINE,
        Objective("throughput", 100, 3, 3, "Met"),
        Objective("memory", 0.9, 0.4, 0.4, "Met"),
    )
    assert await send(payload(alert())) == (200, {"results": ["unconfirmed"]})
    assert world.boosts == {}


async def test_without_measurements_alertmanager_shall_repeat_it(world: World, send: Send) -> None:
    world.problem = "metrics source default did not answer"
    assert await send(payload(alert())) == (503, {"results": ["unavailable"]})
    world.problem, world.arrivals = "", 3.0
    world.objectives = (
        Objective("p95", 0.95, None, None, "Unknown"),
        Objective("memory", 0.9, 0.4, 0.4, "Met"),
    )
    assert await send(payload(alert())) == (503, {"results": ["unavailable"]})
    world.objectives, world.away = (SLOW,), True
    assert await send(payload(alert())) == (503, {"results": ["unavailable"]})
    world.away = False
    assert (await send(payload(alert())))[0] == 200


@pytest.mark.parametrize(
    ("labels", "result"),
    [
        ({"kvpilot_name": "nobody"}, "unknown_resource"),
        ({"namespace": ""}, "unknown_resource"),
        ({"kvpilot_name": "", "name": "chat"}, "boosted"),
    ],
)
async def test_which_resource_is_meant(world: World, send: Send, labels: dict[str, str], result: str) -> None:
    assert await send(payload(alert(**labels))) == (200, {"results": [result]})


async def test_nothing_is_boosted_beyond_the_maximum_or_where_others_scale(world: World, send: Send) -> None:
    world.replicas = 4
    assert (await send(payload(alert())))[1] == {"results": ["at_maximum"]}
    world.policy = replace(POLICY, scaling=None)
    assert (await send(payload(alert())))[1] == {"results": ["not_scalable"]}
    assert world.boosts == {}


@pytest.mark.parametrize("token", [None, "Bearer wrong", "secret", "Bearer ", "Bearer sécret"])
async def test_without_the_token_nobody_gets_in(world: World, send: Send, token: str | None) -> None:
    status, body = await send(payload(alert()), authorization=token)
    assert (status, body) == (401, {"error": "a valid bearer token is required"})
    assert world.counted == ["unauthorized"]
    assert world.boosts == {}


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "[]",
        {"alerts": "x"},
        {"alerts": [{"status": "odd", "fingerprint": "f"}]},
        '{"alerts": [' + "1," * 700_000,
    ],
)
async def test_what_can_never_succeed_is_answered_with_200_and_recorded(
    world: World, send: Send, body: Any
) -> None:
    assert await send(body) == (200, {"results": ["malformed"]})
    assert world.counted == ["malformed"]


async def test_a_truncated_notification_wakes_every_resource(world: World, send: Send) -> None:
    await send(payload(truncated=7))
    assert world.woken == 1


async def test_one_group_may_mix_firing_and_resolved(world: World, send: Send) -> None:
    _, body = await send(payload(alert(), alert("resolved", "f2"), alert(fingerprint="f3", kvpilot_name="x")))
    assert body == {"results": ["boosted", "resolved", "unknown_resource"]}
    assert world.counted == body["results"]


@pytest.mark.parametrize(
    ("objective", "is_missed"),
    [
        (Objective("p50", 0.5, 0.4, 0.9, "Met"), True),
        (Objective("p50", 0.5, None, None, "Unknown"), False),
        (Objective("errors", 0.01, 0.05, 0.0, "Met"), True),
        (Objective("memory", 0.8, 0.7, 0.7, "Met"), False),
        (Objective("throughput", 100, 3, 3, "Breached"), True),
        (Objective("hitRate", 0.7, 0.2, 0.9, "Met"), False),
    ],
)
def test_what_counts_as_missed(objective: Objective, is_missed: bool) -> None:
    assert objective.missed_now is is_missed


async def test_alerts_of_one_incident_are_one_step(world: World, send: Send) -> None:
    assert await send(payload(alert())) == (200, {"results": ["boosted"]})
    world.replicas, world.starting = 3, 1
    others = [alert(fingerprint=name, alertname="HighErrorRate") for name in ("f2", "f3", "f4")]
    assert await send(payload(*others)) == (200, {"results": ["refreshed"] * 3})
    assert {boost.min_replicas for boost in world.boosts.values()} == {3}
    world.starting = 0
    assert await send(payload(alert(fingerprint="f5"))) == (200, {"results": ["boosted"]})
    assert world.boosts["chat-alert-f5@T1"].min_replicas == 4


@pytest.mark.parametrize("bad", [alert(status="pending"), "nonsense", alert() | {"fingerprint": ""}])
async def test_a_malformed_alert_takes_no_other_with_it(world: World, send: Send, bad: Any) -> None:
    assert await send(payload(bad, alert())) == (200, {"results": ["malformed", "boosted"]})


@pytest.mark.parametrize("name", ["Bad Name", "my/thing", "a,b", "x" * 64])
async def test_a_name_that_no_resource_has_is_not_asked_for_again(
    world: World, send: Send, name: str
) -> None:
    world.away = True  # it is not even looked up
    assert await send(payload(alert(kvpilot_name=name))) == (200, {"results": ["unknown_resource"]})
    assert await send(payload(alert(namespace=name))) == (200, {"results": ["unknown_resource"]})


async def test_nothing_is_promised_where_nothing_is_tuned(world: World, send: Send) -> None:
    world.policy = replace(POLICY, mode="Recommend")
    assert await send(payload(alert())) == (200, {"results": ["not_scalable"]})
    assert not world.boosts


@pytest.mark.parametrize(
    ("paused", "mode", "result"),
    [
        ({"paused_by": "stop"}, "Auto", "boosted"),
        ({"paused_by": "stop", "scaling_paused": True}, "Auto", "not_scalable"),
        ({}, "Approve", "boosted"),
    ],
)
async def test_pause_of_tuning_stops_no_alert(
    world: World, send: Send, paused: dict[str, Any], mode: Any, result: str
) -> None:
    world.paused, world.policy = paused, replace(POLICY, mode=mode)
    assert await send(payload(alert())) == (200, {"results": [result]})
