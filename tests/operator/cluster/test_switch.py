"""The kill switch: an option, and a ConfigMap that is read while the operator runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from typer.testing import CliRunner

from kvpilot_operator.adapters.kubernetes.api import ApiError
from kvpilot_operator.cli import app
from kvpilot_operator.cluster.metrics import OperatorMetrics
from kvpilot_operator.cluster.switch import KillSwitch
from kvpilot_operator.reconcile.fleet import Fleet
from kvpilot_operator.status.snapshot import Key


class ConfigMaps:
    """One ConfigMap; None if it does not exist."""

    def __init__(self, data: Mapping[str, Any] | None) -> None:
        self.data = data
        self.down = False
        self.asked: list[str] = []
        self.changes = 0

    async def get(self, path: str) -> Mapping[str, Any] | None:
        self.asked.append(path)
        if self.down:
            raise ApiError("down", 503)
        return None if self.data is None else {"data": self.data}

    async def changed(self) -> None:
        self.changes += 1


def switch(maps: ConfigMaps, fleet: Fleet, *, enabled: bool = True, named: bool = True) -> KillSwitch:
    name = Key("ops", "kvpilot-tuning") if named else None
    return KillSwitch(maps, fleet, enabled=enabled, config_map=name, changed=maps.changed)


@pytest.mark.parametrize(
    ("data", "off"),
    [
        (None, ""),
        ({}, ""),
        ({"tuning": "on"}, ""),
        ({"tuning": "off"}, "ConfigMap ops/kvpilot-tuning says tuning: off"),
        (
            {"tuning": "off", "by": "ana", "reason": "incident\n4711"},
            "ConfigMap ops/kvpilot-tuning says tuning: off, by ana (incident 4711)",
        ),
        ({"tuning": "on", "by": "ana"}, ""),
        ({"tuning": "Off "}, 'ConfigMap ops/kvpilot-tuning: tuning must be "on" or "off", got \'Off \''),
    ],
)
async def test_the_config_map_switches_tuning_off(data: Mapping[str, Any] | None, off: str) -> None:
    maps, fleet = ConfigMaps(data), Fleet(rules="x")
    await switch(maps, fleet).read()
    assert fleet.off == off
    assert maps.asked == ["/api/v1/namespaces/ops/configmaps/kvpilot-tuning"]
    assert maps.changes == bool(off)


async def test_it_is_switched_on_again_and_every_change_reconciles_all() -> None:
    maps, fleet = ConfigMaps({"tuning": "off"}), Fleet(rules="x")
    watched = switch(maps, fleet)
    await watched.read()
    await watched.read()
    assert maps.changes == 1
    maps.data = None
    await watched.read()
    assert (fleet.off, maps.changes) == ("", 2)


async def test_what_cannot_be_read_leaves_the_switch_as_it_is() -> None:
    maps, fleet = ConfigMaps({"tuning": "off"}), Fleet(rules="x")
    watched = switch(maps, fleet)
    await watched.read()
    maps.down = True
    with pytest.raises(ApiError):
        await watched.read()
    assert fleet.off == "ConfigMap ops/kvpilot-tuning says tuning: off"


@pytest.mark.parametrize("data", [None, {"tuning": "on"}])
async def test_the_option_wins(data: Mapping[str, Any] | None) -> None:
    maps, fleet = ConfigMaps(data), Fleet(rules="x")
    await switch(maps, fleet, enabled=False).read()
    assert fleet.off == "the operator runs with --tuning=off"
    assert maps.asked == []


async def test_without_a_config_map_nothing_is_read() -> None:
    maps, fleet = ConfigMaps({"tuning": "off"}), Fleet(rules="x")
    await switch(maps, fleet, named=False).read()
    assert (fleet.off, maps.asked) == ("", [])


def test_the_switch_and_blocked_rules_are_exported() -> None:
    metrics = OperatorMetrics()
    assert "\nkvpilot_operator_tuning_enabled 1.0\n" in metrics.text().decode()
    metrics.fleet(tuning=False, recommend_only=frozenset({"workers-up"}))
    said = metrics.text().decode()
    assert "\nkvpilot_operator_tuning_enabled 0.0\n" in said
    assert '\nkvpilot_operator_rule_recommend_only{rule="workers-up"} 1.0\n' in said
    metrics.fleet(tuning=True, recommend_only=frozenset())
    assert "recommend_only{" not in metrics.text().decode()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("--tuning-configmap", "kvpilot-tuning"),
            "--tuning-configmap: must be NAMESPACE/NAME, got kvpilot-tuning",
        ),
        (("--tuning", "no"), "--tuning: 'no' is not one of 'on', 'off'"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: tuple[str, ...], line: str) -> None:
    done = CliRunner().invoke(app, ["operator", *arguments])
    assert (done.exit_code, done.stderr) == (2, f"kvpilot operator: {line}\n")
