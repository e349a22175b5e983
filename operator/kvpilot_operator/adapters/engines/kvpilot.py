"""The ``Engines`` port over kvpilot's admin API, in a cluster and on one machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel

from kvpilot_engine.contract import CONTRACT_VERSION, AdminConfig, ApplyReport, ConfigPatch
from kvpilot_engine.contract.config import COLD_FIELDS, QUIET
from kvpilot_operator.ports import EngineCallError
from kvpilot_operator.status.snapshot import Replica
from kvpilot_operator.tuning.observation import EngineProblem

CONTRACTS = (CONTRACT_VERSION - 1, CONTRACT_VERSION)
"""Contract versions that this operator speaks: its own and the one before, for upgrades."""

Body = TypeVar("Body", bound=BaseModel)

MAX_REASON = 300
"""Longest excerpt of an engine's answer in an error, characters."""


class EngineAdmin:
    """Describes and changes engines. One instance serves all engines; close it at the end.

    Args:
        read_timeout_s: for one question.
        apply_timeout_s: for one change, which the engine prepares before it answers.
    """

    def __init__(self, read_timeout_s: float = 3.0, apply_timeout_s: float = 15.0) -> None:
        self._read_timeout = aiohttp.ClientTimeout(total=read_timeout_s, connect=min(2.0, read_timeout_s))
        self._apply_timeout = aiohttp.ClientTimeout(total=apply_timeout_s, connect=min(2.0, apply_timeout_s))
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def describe(self, replica: Replica) -> AdminConfig:
        """Version, knobs, live values, ceilings.

        Raises:
            EngineCallError: no answer, or a contract version that this operator does not speak.
        """
        body = await self._call("GET", replica, self._read_timeout)
        live = _parsed(AdminConfig, body, replica)
        if live.contract_version not in CONTRACTS:
            raise EngineCallError(
                f"{replica.name} speaks contract {live.contract_version}, this operator knows "
                f"{' and '.join(map(str, CONTRACTS))}",
                "refused",
            )
        return live

    async def apply(self, replica: Replica, patch: ConfigPatch) -> ApplyReport:
        """Apply, then verify by reading back.

        Raises:
            EngineCallError: no answer, a refusal, or another configuration afterwards.
        """
        body = await self._call(
            "PATCH", replica, self._apply_timeout, patch.model_dump(mode="json", by_alias=True)
        )
        report = _parsed(ApplyReport, body, replica)
        live = await self.describe(replica)
        different = differing(live, patch.values)
        if live.generation != patch.generation or different:
            raise EngineCallError(
                f"{replica.name} accepted generation {patch.generation} and runs {live.generation}"
                + (f"; different: {', '.join(different)}" if different else ""),
                "refused",
            )
        return report

    async def _call(
        self, method: str, replica: Replica, limit: aiohttp.ClientTimeout, body: Any = None
    ) -> str:
        """Send one request to the replica's admin API; returns the body."""
        if not replica.admin_url:
            raise EngineCallError(f"{replica.name} has no address yet", "unreachable")
        if self._session is None:
            self._session = aiohttp.ClientSession()
        try:
            async with self._session.request(
                method,
                f"{replica.admin_url}/admin/config",
                json=body,
                headers={"Authorization": f"Bearer {replica.admin_token}"},
                timeout=limit,
                allow_redirects=False,
            ) as response:
                text = await response.text(errors="replace")
        except TimeoutError as error:
            raise EngineCallError(
                f"{replica.name} did not answer within {limit.total:g} s", "unreachable"
            ) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise EngineCallError(f"{replica.name} cannot be reached: {error}", "unreachable") from error
        if response.status == 200:
            return text
        message = f"{replica.name} answered {response.status}: {_reason(text)}"
        raise EngineCallError(message, _problem(response.status, text))


def _problem(status: int, text: str) -> EngineProblem:
    """The code of an answer that is not 200."""
    if status in {401, 403}:
        return "unauthorized"
    return "stale_epoch" if status == 409 and not _is_cold(text) else "refused"


def differing(live: AdminConfig, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Hot fields (camelCase) whose value in ``values`` differs from the one that runs.

    A field is cold by its nature, or because the value is above what the engine can take without a restart.

    Raises:
        EngineCallError: ``values`` are no valid configuration.
    """
    try:
        wanted = live.config.updated(dict(values))
    except ValidationError as error:
        raise EngineCallError(f"not a configuration: {error.errors()[0]['msg']}", "refused") from error
    named = {to_camel(name) for name in values} | set(values)
    hot: list[str] = []
    for name, value in live.config.difference(wanted).items():
        camel = to_camel(name)
        ceiling = live.ceilings.get(camel)
        above = ceiling is not None and isinstance(value, int | float) and value > ceiling
        if camel in named and name not in COLD_FIELDS and not above:
            hot.append(camel)
    return tuple(sorted(hot))


def _parsed(model: type[Body], text: str, replica: Replica) -> Body:
    try:
        return model.model_validate_json(text, context=QUIET)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise EngineCallError(
            f"{replica.name} answered something else than {model.__name__}: {where}: {first['msg']}",
            "refused",
        ) from error


def _reason(text: str) -> str:
    """The message of an error body, whichever of the usual shapes it has."""
    try:
        body = json.loads(text)
    except ValueError:
        return text[:MAX_REASON]
    for key in ("error", "detail", "message"):
        if isinstance(body, dict) and key in body:
            body = body[key]
    return (body if isinstance(body, str) else json.dumps(body))[:MAX_REASON]


def _is_cold(text: str) -> bool:
    """True if a 409 is about a field that needs a restart, not about a newer writer."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(error, dict) and error.get("code") == "cold"
