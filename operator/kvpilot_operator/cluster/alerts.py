"""Alertmanager's webhook. A verified alert becomes an expiring boost, and nothing else.

Alertmanager delivers at least once and retries refused notifications: an alert that can never succeed gets
200 and is recorded, one that may succeed later gets 503.
"""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import structlog
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from kvpilot_operator.ports import BoostingCluster
from kvpilot_operator.reconcile.reconciler import Reconciliation
from kvpilot_operator.resource.fields import DNS_LABEL
from kvpilot_operator.resource.times import to_rfc3339
from kvpilot_operator.status import events
from kvpilot_operator.status.snapshot import Key

log = structlog.get_logger(__name__)

MAX_BYTES = 1 << 20
MAX_ALERTS = 500


class Result(StrEnum):
    """How one alert ended."""

    BOOSTED = "boosted"
    REFRESHED = "refreshed"
    DUPLICATE = "duplicate"  #: the boost was renewed a short while ago
    SHORTENED = "shortened"  #: resolved: the boost ends soon
    RESOLVED = "resolved"  #: resolved, and there was no boost
    UNKNOWN_RESOURCE = "unknown_resource"
    UNCONFIRMED = "unconfirmed"  #: measurements show no missed objective
    NOT_SCALABLE = "not_scalable"  #: kvpilot does not choose the number of replicas now
    AT_MAXIMUM = "at_maximum"
    UNAVAILABLE = "unavailable"  #: could not be verified now; Alertmanager retries
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


class AlertReceiver:
    """Verifies alerts and turns them into boosts.

    Args:
        reconcile: reconciles a resource now; None if it does not exist or has no valid spec.
        wake: makes every resource due.
        count: receives the result of each alert.
        token_file: holds the bearer token.
        ttl_s: life of a boost; a repeated alert renews it.
        resolved_s: how long a boost outlives its alert.
    """

    def __init__(
        self,
        cluster: BoostingCluster,
        reconcile: Callable[[Key], Awaitable[Reconciliation | None]],
        wake: Callable[[], Awaitable[None]],
        count: Callable[[str], None],
        *,
        token_file: Path,
        ttl_s: float = 600.0,
        resolved_s: float = 60.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cluster = cluster
        self._reconcile = reconcile
        self._wake = wake
        self._count = count
        self._token_file = token_file
        self._ttl_s = ttl_s
        self._resolved_s = resolved_s
        self._clock = clock

    def app(self) -> web.Application:
        """The HTTP application with ``POST /alerts``."""
        app = web.Application(client_max_size=MAX_BYTES)
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
        taken = payload.alerts[:MAX_ALERTS]
        results = [await self._counted(item, payload.group_key) for item in taken]
        if missing := payload.truncated_alerts + len(payload.alerts) - len(taken):
            log.warning("alerts_truncated", missing=missing, group=payload.group_key)
            await self._wake()
        return web.json_response({"results": results}, status=503 if Result.UNAVAILABLE in results else 200)

    def _authorized(self, header: str) -> bool:
        """Compare in constant time; without a token every request is refused."""
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
        held = next((boost for boost in snapshot.overrides.boosts if boost.name == name), None)
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
        """Verify by a new reconcile, then boost; ``minimum`` is that of an earlier boost of this alert."""
        reconcile = await self._reconcile(key)
        if reconcile is None:
            return Result.UNKNOWN_RESOURCE
        scaling, observation = reconcile.policy.scaling, reconcile.observation
        others = observation.scaling_paused or observation.replicas_managed_by
        if scaling is None or others or not reconcile.policy.acts:
            return Result.NOT_SCALABLE
        if not any(item.missed_now for item in reconcile.decision.objectives):
            return Result.UNCONFIRMED if judged(reconcile) else Result.UNAVAILABLE
        if not minimum:
            if observation.desired_replicas >= scaling.maximum:
                return Result.AT_MAXIMUM
            # Several alerts of one incident are one step: replicas that are starting count as capacity.
            starting = len(observation.ready) < observation.desired_replicas
            minimum = observation.desired_replicas if starting else observation.desired_replicas + 1
        renewed = any(boost.min_replicas >= minimum for boost in reconcile.snapshot.overrides.boosts)
        until = self._clock() + self._ttl_s
        override = await self._cluster.boost(reconcile.snapshot, identity, minimum, until, why)
        if not renewed:
            event = events.boosted(why.removeprefix("alert "), override, minimum, to_rfc3339(int(until)))
            await self._cluster.event(reconcile.snapshot, event.kind, event.reason, event.message)
        await self._reconcile(key)
        return Result.REFRESHED if renewed else Result.BOOSTED


def judged(reconcile: Reconciliation) -> bool:
    """True if measurements contradict an alert: requests were judged, or there are none to judge."""
    observation = reconcile.observation
    if observation.metrics_problem or not any(pod.sample for pod in observation.ready):
        return False
    if not observation.counts("short").arrivals:
        return True
    return any(
        item.measured_short is not None for item in reconcile.decision.objectives if item.name != "memory"
    )
