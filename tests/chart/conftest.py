"""Fixtures for Helm and the rendered chart."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from scripts.manifests import CHART, find_helm

Render = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def helm() -> str:
    """Path of Helm; without it the tests are skipped, or fail if CI=true."""
    found = find_helm()
    if found is None:
        reason = "no helm: `make programs` builds it, or install it"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def template(helm: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `helm template` with the given `--set` arguments."""

    def run(*values: str) -> subprocess.CompletedProcess[str]:
        chosen = [part for value in values for part in ("--set", value)]
        command = [helm, "template", "kvpilot", str(CHART), "--namespace", "kvpilot-system", *chosen]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    return run


@pytest.fixture(scope="session")
def render(template: Callable[..., subprocess.CompletedProcess[str]]) -> Render:
    """The objects that the chart renders."""

    def run(*values: str) -> list[dict[str, Any]]:
        done = template(*values)
        assert done.returncode == 0, done.stderr
        return [item for item in yaml.safe_load_all(done.stdout) if item]

    return run
