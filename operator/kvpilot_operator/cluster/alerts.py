"""Alertmanager's webhook. An alert is a hint: verified, it becomes an expiring boost, and nothing else.

Delivery is at least once, and Alertmanager repeats what is refused: what can never succeed is answered with
200 and recorded, what may succeed later with 503.
"""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol

import structlog
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from kvpilot_operator import events
from kvpilot_operator.loop import Look
from kvpilot_operator.ports import Cluster, Key, Snapshot
from kvpilot_operator.spec.fields import DNS_LABEL
from kvpilot_operator.spec.times import to_rfc3339
from kvpilot_operator.tuning.decision import Objective

log = structlog.get_logger(__name__)

MOST_BYTES = 1 << 20
MOST_ALERTS = 500


class Result(StrEnum):
    """What became of one alert."""

    BOOSTED = "boosted"
    REFRESHED = "refreshed"
    DUPLICATE = "duplicate"  #: the boost is young enough
    SHORTENED = "shortened"  #: resolved: the boost ends soon
    RESOLVED = "resolved"  #: resolved, and there was no boost
    UNKNOWN_RESOURCE = "unknown_resource"
    UNCONFIRMED = "unconfirmed"  #: our own measurements show no objective missed
    NOT_SCALABLE = "not_scalable"  #: somebody else chooses the number of replicas, or nothing is tuned now
    AT_MAXIMUM = "at_maximum"
    UNAVAILABLE = "unavailable"  #: could not be verified now; Alertmanager repeats it
    MALFORMED = "malformed"
    UNAUTHORIZED = "unauthorized"


class Alert(BaseModel):
    """One alert of the payload; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel)

    status: Literal["firing", "resolved"]
    labels: Mapping[str, str] = Field(default_factory=dict)
    starts_at: str = ""
    fingerprint: str = Field(min_length=1, max_length=256)

    @property
    def key(self) -> Key | None:
        """The resource it names; None when it names none."""
        namespace = self.labels.get("namespace", "")
        name = self.labels.get("kvpilot_name") or self.labels.get("name", "")
        named = all(DNS_LABEL.fullmatch(item) for item in (namespace, name))
        return Key(namespace, name) if named else None


class Payload(BaseModel):
    """What Alertmanager sends, version 4."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel)

    group_key: str = ""
    truncated_alerts: int = 0
    alerts: tuple[Any, ...]


class Boosts(Cluster, Protocol):
    """The cluster, able to hold boosts."""

    async def boost(self, snapshot: Snapshot, fingerprint: str, minimum: int, until: float, why: str) -> str:
        """Create or refresh the override of one alert; its name."""

    def boost_name(self, key: Key, fingerprint: str) -> str:
        """Name of the override of one alert."""


class AlertReceiver:
    """Verifies alerts and turns them into boosts.

    Args:
        look: looks at a resource now, and returns what was seen; None when it is gone or its spec is bad.
        wake: brings the next look at every resource forward.
        count: told the result of each alert.
        token_file: holds the bearer token.
        ttl_s: life of a boost; a repeated alert renews it.
        resolved_s: how long a boost outlives its alert.
    """

    def __init__(
        self,
        cluster: Boosts,
        look: Callable[[Key], Awaitable[Look | None]],
        wake: Callable[[], Awaitable[None]],
        count: Callable[[str], None],
        *,
        token_file: Path,
        ttl_s: float = 600.0,
        resolved_s: float = 60.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cluster = cluster
        self._look = look
        self._wake = wake
        self._count = count
        self._token_file = token_file
        self._ttl_s = ttl_s
        self._resolved_s = resolved_s
        self._clock = clock

    def app(self) -> web.Application:
        """The HTTP application with ``POST /alerts``."""
        app = web.Application(client_max_size=MOST_BYTES)
        app.add_routes([web.post("/alerts", self.receive)])
        return app

    async def receive(self, request: web.Request) -> web.Response:
        """One notification."""
        if not self._authorized(request.headers.get("Authorization", "")):
            self._count(Result.UNAUTHORIZED)
            return web.json_response({"error": "a valid bearer token is required"}, status=401)
        try:
            payload = Payload.model_validate(json.loads(await request.text()))
        except (ValueError, LookupError, RecursionError, web.HTTPRequestEntityTooLarge) as error:
            return web.json_response({"results": [self._malformed(error)]})
        taken = payload.alerts[:MOST_ALERTS]
        results = [await self._counted(item, payload.group_key) for item in taken]
        if missing := payload.truncated_alerts + len(payload.alerts) - len(taken):
            log.warning("alerts_truncated", missing=missing, group=payload.group_key)
            await self._wake()
        return web.json_response({"results": results}, status=503 if Result.UNAVAILABLE in results else 200)

    def _authorized(self, header: str) -> bool:
        """Constant time; no token means nobody gets in."""
        try:
            token = self._token_file.read_text().strip()
        except OSError as error:
            log.warning("alerts_token_unreadable", error=str(error))
            return False
        return bool(token) and hmac.compare_digest(header.encode(), f"Bearer {token}".encode())

    def _malformed(self, error: Exception) -> Result:
        log.warning("alert_malformed", error=str(error)[:500])
        self._count(Result.MALFORMED)
        return Result.MALFORMED

    async def _counted(self, item: Any, group: str) -> Result:
        try:
            alert = Alert.model_validate(item)
        except ValidationError as error:
            return self._malformed(error)
        try:
            result = await self._take(alert)
        except Exception as error:
            log.warning("alert_not_verified", error=str(error), fingerprint=alert.fingerprint)
            result = Result.UNAVAILABLE
        self._count(result)
        log.info("alert", result=result, status=alert.status, labels=dict(alert.labels), group=group)
        return result

    async def _take(self, alert: Alert) -> Result:
        key = alert.key
        snapshot = await self._cluster.read(key) if key is not None else None
        if key is None or snapshot is None:
            return Result.UNKNOWN_RESOURCE
        identity = f"{alert.fingerprint}@{alert.starts_at}"
        name = self._cluster.boost_name(key, identity)
        held = next((boost for boost in snapshot.boosts if boost.name == name), None)
        now = self._clock()
        why = f"alert {alert.labels.get('alertname', alert.fingerprint)}"
        if alert.status == "resolved":
            if held is None:
                return Result.RESOLVED
            until = min(held.expires_at, now + self._resolved_s)
            await self._cluster.boost(snapshot, identity, held.min_replicas, until, f"{why}, resolved")
            return Result.SHORTENED
        if held is not None and held.expires_at - now > self._ttl_s / 2:
            return Result.DUPLICATE
        return await self._boost(key, identity, why, held.min_replicas if held else 0)

    async def _boost(self, key: Key, identity: str, why: str, minimum: int) -> Result:
        """Verify by a fresh look, then boost; ``minimum`` is what a boost of this alert asks for already."""
        look = await self._look(key)
        if look is None:
            return Result.UNKNOWN_RESOURCE
        scaling, observation = look.policy.scaling, look.observation
        others = observation.paused_by or observation.replicas_managed_by
        if scaling is None or others or look.policy.mode != "Auto":
            return Result.NOT_SCALABLE
        if not any(map(missed, look.decision.objectives)):
            return Result.UNCONFIRMED if judged(look) else Result.UNAVAILABLE
        if not minimum:
            if observation.replicas >= scaling.maximum:
                return Result.AT_MAXIMUM
            # One incident is one step, however many alerts tell of it: pods that start count as capacity.
            starting = len(observation.ready) < observation.replicas
            minimum = observation.replicas if starting else observation.replicas + 1
        renewed = any(boost.min_replicas >= minimum for boost in look.snapshot.boosts)
        until = self._clock() + self._ttl_s
        override = await self._cluster.boost(look.snapshot, identity, minimum, until, why)
        if not renewed:
            event = events.boosted(why.removeprefix("alert "), override, minimum, to_rfc3339(int(until)))
            await self._cluster.event(look.snapshot, event.kind, event.reason, event.message)
        await self._look(key)
        return Result.REFRESHED if renewed else Result.BOOSTED


def judged(look: Look) -> bool:
    """Whether measurements speak against an alert: requests were judged, or there are none to judge."""
    observation = look.observation
    if observation.metrics_problem or not any(pod.sample for pod in observation.ready):
        return False
    if not observation.counts("short").arrivals:
        return True
    return any(item.measured_short is not None for item in look.decision.objectives if item.name != "memory")


def missed(objective: Objective) -> bool:
    """Whether an objective is missed in the short window: enough to believe an alert that says so."""
    short = objective.measured_short
    if objective.state == "Breached":
        return True
    if short is None or objective.name in {"throughput", "hitRate"}:
        # Less than the target may simply not have been asked for.
        return False
    above_is_bad = objective.name in {"errors", "memory"}
    return short > objective.target if above_is_bad else short < objective.target
