"""`kvpilot top`: figures of each replica from the pages of its engine, locally and through the API server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.operator.cli.api_server import ApiServer, serving
from tests.operator.cli.runs import manifest, ok, refused

from kvpilot_engine.contract import metrics as names
from kvpilot_operator.adapters.metrics.series import COUNTERS, GAUGES
from kvpilot_operator.cli.arguments import ANYWHERE
from kvpilot_operator.cli.figures import Watcher
from kvpilot_operator.cli.target import find
from kvpilot_operator.local.state import StateDirectory


class Engine:
    """A metrics page whose counters grow with each read: 20 requests, 15 of them within 500 ms, 18 good."""

    def __init__(self, generation: int = 7) -> None:
        self.reads = 0
        self.generation = generation

    def page(self) -> str:
        self.reads += 1
        lines = [f"{name} 0" for name in (*COUNTERS, *GAUGES) if not name.endswith("_bucket")]
        lines = [line for line in lines if line.split()[0] not in {names.CONFIG_GENERATION}]
        for edge in names.EDGES_S:
            good = 15 if edge < 1 else 18
            for histogram in (names.REQUEST_SECONDS, names.FIRST_TOKEN_SECONDS):
                lines.append(f'{histogram}_bucket{{le="{edge}"}} {good * self.reads}')
        lines += [
            f"{names.ARRIVALS_TOTAL} {20 * self.reads}",
            f'{names.REQUESTS_TOTAL}{{outcome="ok"}} {18 * self.reads}',
            f'{names.REQUESTS_TOTAL}{{outcome="shed"}} {2 * self.reads}',
            f"{names.QUERY_TOKENS_TOTAL} {1000 * self.reads}",
            f'{names.HIT_TOKENS_TOTAL}{{tier="pool"}} {600 * self.reads}',
            f"{names.STEPS_TOTAL} {10 * self.reads}",
            f"{names.STEP_ROWS_TOTAL} {75 * self.reads}",
            f"{names.REQUESTS_WAITING} 4",
            f"{names.REQUESTS_RUNNING} 3",
            f'{names.MEMORY_RATIO}{{kind="host"}} 0.5',
            f"{names.CONFIG_GENERATION} {self.generation}",
        ]
        return "\n".join(lines) + "\n"


@pytest.fixture
def engines(run: StateDirectory, tmp_path: Path) -> list[Engine]:
    return [Engine(), Engine(8)]


def publish(server: ApiServer, run: StateDirectory, engines: list[Engine], *more: str) -> None:
    server.pages = {f"/{index}/metrics": engine.page for index, engine in enumerate(engines)}
    urls = {f"engine-{index}": f"{server.url}/{index}/metrics" for index in range(len(engines))}
    run.write_replicas(urls | dict.fromkeys(more, f"{server.url}/nothing"))


def test_figures_are_those_of_the_window(run: StateDirectory, engines: list[Engine], tmp_path: Path) -> None:
    with serving(tmp_path / "unused") as server:
        publish(server, run, engines, "engine-9")
        now = [100.0]
        watcher = Watcher(find("chat", ANYWHERE), clock=lambda: now[0])
        watcher.read()
        assert [item.problem for item in watcher.figures()][:2] == ["seen once so far"] * 2
        now[0] += 2
        watcher.read()
        one, two, silent, every = watcher.figures()
    assert (one.replica, one.rate, one.completed, one.attainment) == ("engine-0", 10.0, 9.0, 0.75)
    assert (one.waiting, one.running, one.memory, one.hit_rate, one.rows) == (4, 3, 0.5, 0.6, 7.5)
    assert (one.generation, two.generation, every.generation) == (7, 8, None)
    assert (every.replica, every.rate, every.waiting) == ("all", 20.0, 8)
    assert (silent.replica, silent.problem) == ("engine-9", "does not answer")


def test_one_table_and_figures_for_programs(
    run: StateDirectory, engines: list[Engine], tmp_path: Path
) -> None:
    with serving(tmp_path / "unused") as server:
        publish(server, run, engines)
        heading, *rows = ok("top", "chat", "--once", "--interval", "0.5").splitlines()
        plain = json.loads(ok("top", "chat", "--interval", "0.5", "-o", "json"))
    assert heading.split("  ")[0] == "REPLICA"
    assert "p95 <= 500 MS" in heading
    assert [row.split()[0] for row in rows] == ["engine-0", "engine-1", "all"]
    assert rows[0].split()[3:] == ["75%", "4", "3", "50%", "60%", "7.5", "7"]
    assert (plain[0]["replica"], plain[0]["hitRate"]) == ("engine-0", 0.6)


def test_pods_are_asked_through_the_api_server(api: ApiServer) -> None:
    ready = {"conditions": [{"type": "Ready", "status": "True"}]}
    pods = "/api/v1/namespaces/team-a/pods"
    for name, status in (("chat-a", ready), ("chat-b", {}), ("chat-c", ready)):
        api.objects[f"{pods}/{name}"] = {"metadata": {"name": name}, "status": status}
    api.pages[f"{pods}/chat-a:8000/proxy/metrics"] = Engine().page
    lines = ok("top", "chat", "--interval", "0.5").splitlines()
    assert [line.split()[0] for line in lines] == ["REPLICA", "chat-a", "chat-c"]
    assert lines[2].endswith("does not answer")
    api.forbidden.add(("GET", "proxy"))
    assert "is forbidden" in refused("top", "chat")


def test_no_replicas_and_an_ended_run_are_one_line(run: StateDirectory) -> None:
    assert refused("top", "chat") == "kvpilot top: chat has no replica that serves"
    run.write_resource({**manifest(), "spec": {"replicas": "many"}})
    assert refused("top", "chat").startswith("kvpilot top: spec.replicas: Input should be a valid integer")
    run.close()
    assert refused("top", "chat") == "kvpilot top: the run of chat has ended; there are no replicas"
