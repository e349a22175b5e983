"""The kill switch of tuning: an option of the operator, and a ConfigMap that is read while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import structlog

from kvpilot_operator.adapters.kubernetes.api import path_of
from kvpilot_operator.reconcile.fleet import Fleet
from kvpilot_operator.status.snapshot import Key

log = structlog.get_logger(__name__)

SWITCH_KEY = "tuning"
"""Key of the ConfigMap; its value is ``on`` or ``off``."""

BY_KEY, REASON_KEY = "by", "reason"
"""Keys that say who switched it off and why, for those who read the status."""

TEXT_LIMIT = 200
"""Characters that are kept of each of the two."""


class Reader(Protocol):
    """Reads an object by its path; None if there is none."""

    async def get(self, path: str) -> Mapping[str, Any] | None:
        """The object.

        Raises:
            ApiError: the API server did not answer, or refused.
        """


class KillSwitch:
    """Switches tuning of a fleet off and on. A ConfigMap that cannot be read leaves the switch as it is.

    Args:
        enabled: the option; False keeps tuning off whatever the ConfigMap says.
        config_map: its namespace and name; None to read none. Without an object of that name tuning is on.
        changed: called after a change, to reconcile all resources.
    """

    def __init__(
        self,
        api: Reader,
        fleet: Fleet,
        *,
        enabled: bool,
        config_map: Key | None,
        changed: Callable[[], Awaitable[None]],
    ) -> None:
        self._api, self._fleet = api, fleet
        self._enabled, self._config_map, self._changed = enabled, config_map, changed

    async def read(self) -> None:
        """Read the switch once.

        Raises:
            ApiError: the API server did not answer, or refused.
        """
        off = "" if self._enabled else "the operator runs with --tuning=off"
        if not off and (name := self._config_map) is not None:
            found = await self._api.get(path_of("v1", "ConfigMap", name.namespace, name.name))
            off = _off(name, (found or {}).get("data") or {})
        if off == self._fleet.off:
            return
        self._fleet.off = off
        log.warning("tuning_switched", tuning="off" if off else "on", reason=off)
        await self._changed()

    async def watch(self, every_s: float) -> None:
        """Read the switch again and again."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.read()
            except Exception as error:
                log.warning("switch_not_read", config_map=str(self._config_map), error=str(error))


def _off(name: Key, data: Mapping[str, Any]) -> str:
    """Why tuning is off; "" while it is on. What is neither counts as off: somebody wanted to stop it."""
    value = data.get(SWITCH_KEY, "on")
    if value == "on":
        return ""
    who, why = (" ".join(str(data.get(key, "")).split())[:TEXT_LIMIT] for key in (BY_KEY, REASON_KEY))
    said = (f", by {who}" if who else "") + (f" ({why})" if why else "")
    if value == "off":
        return f"ConfigMap {name} says {SWITCH_KEY}: off{said}"
    return f'ConfigMap {name}: {SWITCH_KEY} must be "on" or "off", got {value!r:.40}{said}'
