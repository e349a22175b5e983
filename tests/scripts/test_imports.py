"""Packages import each other in one direction, and import-linter knows every one of them."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
HALVES = ("kvpilot_engine", "kvpilot_operator")


@cache
def graph(half: str) -> grimp.ImportGraph:
    """Import graph of both halves, in which each top-level package of ``half`` is one node."""
    found = grimp.build_graph(*HALVES, cache_dir=None)
    for package in found.find_children(half):
        found.squash_module(package)
    return found


def packages(half: str) -> list[str]:
    """Top-level packages and modules of a half."""
    return sorted(graph(half).find_children(half))


def arrows(half: str) -> dict[str, set[str]]:
    """Direct imports between packages: importer -> imported."""
    nodes = set(packages(half))
    return {node: graph(half).find_modules_directly_imported_by(node) & nodes for node in nodes}


def cycle(arrows: dict[str, set[str]]) -> list[str]:
    """Packages in a cycle: those left after repeatedly removing packages that import none of the rest."""
    left = dict(arrows)
    while leaves := [node for node, imported in left.items() if not imported & set(left) - {node}]:
        for node in leaves:
            del left[node]
    return sorted(left)


def test_cycle_is_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("half", HALVES)
def test_packages_have_no_import_cycle(half: str) -> None:
    assert len(packages(half)) > 5
    assert cycle(arrows(half)) == []


@pytest.mark.parametrize("half", HALVES)
def test_contracts_name_every_package(half: str) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = {
        f"{container}{name.strip()}"
        for contract in contracts
        for container in [f"{item}." for item in contract.get("containers", [])] or [""]
        for key in ("layers", "source_modules", "modules")
        for entry in contract.get(key, [])
        for name in entry.replace("|", ":").split(":")
    }
    missing = [package for package in packages(half) if package not in named]
    assert missing == []
