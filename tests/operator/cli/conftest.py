"""A directory with a run of `chat` that is up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.operator.cli.api_server import ApiServer, serving
from tests.operator.cli.runs import manifest, running

from kvpilot_operator.local.state import StateDirectory


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StateDirectory]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvpilot_operator.cli.local_run.PAGE_TIMEOUT_S", 60.0)  # a busy machine is no silence
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "no-such-file"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with running(tmp_path, manifest()) as state:
        yield state


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """An API server with `chat` in namespace team-a; there is no local run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with serving(tmp_path / "kubeconfig") as server:
        document = manifest()
        document["metadata"]["namespace"] = "team-a"
        server.add("kvcachedeployments", document)
        yield server
