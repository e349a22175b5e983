"""The Prometheus adapter against a real Prometheus that scrapes small exporters, and against impostors."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from tests.ports import free_port
from tests.prometheus import Prometheus

from kvpilot_engine.contract import metrics as names
from kvpilot_operator.adapters.prometheus_metrics import PrometheusMetrics
from kvpilot_operator.adapters.series import COUNTERS, GAUGES
from kvpilot_operator.ports import Key, MetricsError
from kvpilot_operator.sources import Source
from kvpilot_operator.tuning.observation import Sample

SCRAPE_S = 0.2
WINDOWS = {"short": 1.0, "long": 3.0}
CHAT = Key("team-a", "chat")
CODE = Key("team-b", "code")


def binary() -> Path:
    """Prometheus as `make cluster-up` built it, or as the machine has it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvpilot"
    built = sorted(cache.glob("go/prometheus-*/prometheus"))
    found = built[0] if built else shutil.which("prometheus")
    if found is None:
        reason = "no Prometheus: `make programs` builds one"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return Path(found)


class Exporter:
    """One engine's /metrics: every series of the contract, with values that a test sets."""

    def __init__(self, pod: str, key: Key) -> None:
        self.labels = {
            "namespace": key.namespace, "kvpilot_name": key.name, "pod": pod, "pod_uid": f"uid-{pod}",
            "component": "engine",
        }  # fmt: skip
        self.uid = f"uid-{pod}"
        self.values: dict[str, float] = {}
        self.reset()
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = "".join(f"{series} {value}\n" for series, value in exporter.values.items()).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def reset(self) -> None:
        """As after a restart: everything zero."""
        self.values = {
            name: 0.0 for name in (*COUNTERS, *GAUGES) if not name.endswith(("_bucket", "_requests_total"))
        }
        for histogram in (names.REQUEST_SECONDS, names.FIRST_TOKEN_SECONDS):
            for edge in names.EDGES_S:
                self.values[f'{histogram}_bucket{{le="{edge:g}"}}'] = 0.0
        for outcome in names.Outcome:
            self.values[f'{names.REQUESTS_TOTAL}{{outcome="{outcome}"}}'] = 0.0
        self.values[names.CONFIG_GENERATION] = 7.0

    def finished(self, requests: int) -> None:
        """So many requests arrived and finished within 0.3 s."""
        self.values[names.ARRIVALS_TOTAL] += requests
        self.values[f'{names.REQUESTS_TOTAL}{{outcome="ok"}}'] += requests
        for edge in names.EDGES_S:
            if edge >= 0.3:
                self.values[f'{names.REQUEST_SECONDS}_bucket{{le="{edge:g}"}}'] += requests

    def stop(self) -> None:
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()


@dataclass
class Scraping:
    """A running Prometheus and the exporters that it scrapes, by pod."""

    server: Prometheus
    exporters: dict[str, Exporter]

    @classmethod
    def below(cls, folder: Path, exporters: dict[str, Exporter]) -> Scraping:
        return cls(Prometheus(binary(), folder / "prometheus.yaml", folder, free_port()), exporters)

    @property
    def url(self) -> str:
        return self.server.url

    def start(self) -> None:
        interval = f"{int(SCRAPE_S * 1000)}ms"
        config = {
            "global": {"scrape_interval": interval, "scrape_timeout": interval},
            "scrape_configs": [
                {
                    "job_name": "kvpilot",
                    "static_configs": [
                        {"targets": [f"127.0.0.1:{item.server.server_port}"], "labels": item.labels}
                        for item in self.exporters.values()
                    ],
                }
            ],
        }
        self.server.config.write_text(yaml.safe_dump(config))
        self.server.start()

    def stop(self) -> None:
        for exporter in self.exporters.values():
            exporter.stop()
        self.server.stop()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraping]:
    binary()  # before any thread: a skip here must leave nothing running
    owners = {"chat-1": CHAT, "chat-2": CHAT, "chat-3": CHAT, "chat-4": CHAT, "code-1": CODE}
    owners["strange-1"] = Key(CHAT.namespace, CODE.name)
    running = Scraping.below(
        tmp_path_factory.mktemp("prometheus"), {pod: Exporter(pod, key) for pod, key in owners.items()}
    )
    running.start()
    yield running
    running.stop()


@pytest.fixture
async def metrics(prometheus: Scraping) -> AsyncIterator[PrometheusMetrics]:
    adapter = PrometheusMetrics(
        {"default": Source("default", prometheus.url, SCRAPE_S)}, lambda _: "default", timeout_s=3.0
    )
    yield adapter
    adapter.close()


async def until(
    read: Callable[[], Awaitable[dict[Key, dict[str, Sample]]]],
    good: Callable[[dict[Key, dict[str, Sample]]], bool],
    seconds: float = 15.0,
) -> dict[Key, dict[str, Sample]]:
    """Read until the answer is good; the last answer is told when it never is."""
    deadline, answer = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        try:
            answer = await read()
        except MetricsError as error:
            answer = error
        else:
            if good(answer):
                return answer
        await asyncio.sleep(SCRAPE_S / 2)
    pytest.fail(f"not within {seconds} s: {answer}")


def settled(uid: str, key: Key = CHAT) -> Callable[[Mapping[Key, Mapping[str, Sample]]], bool]:
    """The pod is measured over its whole longest window."""

    def check(found: Mapping[Key, Mapping[str, Sample]]) -> bool:
        sample = found.get(key, {}).get(uid)
        return sample is not None and sample.coverage_s >= WINDOWS["long"] - SCRAPE_S

    return check


async def test_counts_resets_and_staleness(prometheus: Scraping, metrics: PrometheusMetrics) -> None:
    async def read() -> dict[Key, dict[str, Sample]]:
        return await metrics.samples({CHAT: WINDOWS})

    pod = prometheus.exporters["chat-1"]
    young = (await until(read, lambda found: pod.uid in found[CHAT]))[CHAT][pod.uid]
    assert young.coverage_s < WINDOWS["long"]
    await until(read, settled(pod.uid))

    pod.finished(100)
    sample = (await until(read, lambda found: found[CHAT][pod.uid].windows["short"].judged > 0))[CHAT][
        pod.uid
    ]
    for window, length in WINDOWS.items():
        counts = sample.windows[window]
        assert counts.completed == pytest.approx(100, rel=SCRAPE_S / length + 0.05), window
        assert counts.attainment("request", 0.25) == 0.0
        assert counts.attainment("request", 0.3) == pytest.approx(1.0)
        assert counts.pod_seconds == pytest.approx(length, abs=2 * SCRAPE_S)
    assert sample.age_s < 3 * SCRAPE_S + 0.5
    assert sample.gauges.generation == 7

    pod.reset()
    pod.finished(40)
    after = await until(
        read, lambda found: found[CHAT][pod.uid].windows["long"].arrivals > 120, WINDOWS["long"]
    )
    assert after[CHAT][pod.uid].windows["long"].arrivals == pytest.approx(140, rel=0.15)

    pod.stop()
    await until(read, lambda found: pod.uid not in found[CHAT])


async def test_one_set_of_queries_serves_several_resources(
    prometheus: Scraping, metrics: PrometheusMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = prometheus.exporters["chat-2"], prometheus.exporters["code-1"]
    queries: list[str] = []
    source = metrics._sources["default"]
    query = source.query

    async def counted(promql: str) -> list[dict[str, Any]]:
        queries.append(promql)
        return await query(promql)

    monkeypatch.setattr(source, "query", counted)

    async def read() -> dict[Key, dict[str, Sample]]:
        queries.clear()
        chat, code = await asyncio.gather(
            metrics.samples({CHAT: WINDOWS}), metrics.samples({CODE: {"short": 1.0, "long": 2.0}})
        )
        return {**chat, **code}

    found = await until(read, lambda found: settled(one.uid)(found) and two.uid in found[CODE])
    assert one.uid in found[CHAT]
    assert all(uid.startswith("uid-chat") for uid in found[CHAT])
    assert set(found[CODE]) == {two.uid}
    assert found[CODE][two.uid].coverage_s <= 2.0
    assert len(queries) == 4, "last values, and one for each of three lengths"


async def test_a_pod_whose_metrics_are_not_whole_has_no_sample(
    prometheus: Scraping, metrics: PrometheusMetrics
) -> None:
    whole, broken, doubtful = (prometheus.exporters[f"chat-{n}"] for n in (2, 3, 4))
    del broken.values[f'{names.REQUEST_SECONDS}_bucket{{le="0.5"}}']
    doubtful.values[names.MEMORY_RATIO] = float("nan")
    found = await until(
        lambda: metrics.samples({CHAT: WINDOWS}),
        lambda found: whole.uid in found[CHAT] and not {broken.uid, doubtful.uid} & set(found[CHAT]),
    )
    assert whole.uid in found[CHAT]


async def test_a_stopped_prometheus_is_one_clear_error_in_time(tmp_path: Path) -> None:
    running = Scraping.below(tmp_path, {})
    running.start()
    metrics = PrometheusMetrics(
        {"default": Source("default", running.url, SCRAPE_S)}, lambda _: "default", timeout_s=0.5
    )
    try:
        await until(lambda: metrics.samples({CHAT: WINDOWS}), lambda found: found == {CHAT: {}})
        assert running.server.process is not None
        running.server.process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(MetricsError, match=r"default \(http://.*\) did not answer within 0\.5 s"):
            await metrics.samples({CHAT: WINDOWS})
        assert time.monotonic() - started < 2.5
        running.server.process.send_signal(signal.SIGCONT)
        running.stop()
        with pytest.raises(MetricsError, match=r"default \(http://.*\) cannot be read: .*[Rr]efused"):
            await metrics.samples({CHAT: WINDOWS})
    finally:
        metrics.close()
        running.stop()


@pytest.fixture
async def impostor() -> AsyncIterator[Callable[[Callable[[str], web.Response]], Awaitable[str]]]:
    """A server that answers queries as a test says."""
    runners: list[web.AppRunner] = []

    async def start(answer: Callable[[str], web.Response]) -> str:
        async def handle(request: web.Request) -> web.Response:
            return answer(str((await request.post())["query"]))

        app = web.Application()
        app.add_routes([web.post("/api/v1/query", handle)])
        runners.append(web.AppRunner(app))
        await runners[-1].setup()
        await web.TCPSite(runners[-1], "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runners[-1].addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"text": "<html>log in</html>"}, "did not answer with JSON; is the URL right"),
        ({"text": '{"status":"error","error":"no"}'}, "gave an answer without a result: KeyError"),
        ({"text": '{"status":"success","data":{"result":[1,"2"]}}'}, "did not answer with a vector"),
        ({"text": '{"data":{"result":[]},"warnings":["store gone"]}'}, "partial data: store gone"),
        ({"status": 422, "text": "too many samples"}, "refused a query: .*422.*too many samples"),
        ({"status": 401, "text": "who?"}, "refused a query: .*401"),
    ],
)
async def test_answers_that_are_none(impostor: Any, answer: dict[str, Any], message: str) -> None:
    url = await impostor(lambda _query: web.Response(**answer))
    metrics = PrometheusMetrics({"default": Source("default", url, 0.2)}, lambda _: "default")
    with pytest.raises(MetricsError, match=f"metrics source default .*{message}"):
        await metrics.samples({CHAT: WINDOWS})
    metrics.close()


async def test_a_failed_batch_is_halved_until_the_culprit_is_alone(impostor: Any) -> None:
    def answer(query: str) -> web.Response:
        if "culprit" in query:
            return web.Response(status=422, text="too many samples")
        return web.json_response({"status": "success", "data": {"result": []}})

    url = await impostor(answer)
    metrics = PrometheusMetrics({"default": Source("default", url, 0.2)}, lambda _: "default")
    keys = [Key("a", f"chat-{n}") for n in range(7)]
    found = await metrics.samples(dict.fromkeys((*keys, Key("a", "culprit")), WINDOWS))
    assert set(found) == set(keys)
    with pytest.raises(MetricsError, match="422"):
        await metrics.samples({Key("a", "culprit"): WINDOWS})
    metrics.close()


async def test_a_source_that_scrapes_too_slowly_says_so() -> None:
    metrics = PrometheusMetrics({"slow": Source("slow", "http://nowhere", 15.0)}, lambda _: "slow")
    with pytest.raises(
        MetricsError, match=r"^ScrapeTooSlow: window short of 10 s is below 4 scrape intervals"
    ):
        await metrics.samples({CHAT: {"short": 10.0, "long": 60.0}})
    metrics.close()


async def test_a_source_that_nobody_configured_is_named() -> None:
    metrics = PrometheusMetrics({"default": Source("default", "http://nowhere")}, lambda _: "mine")
    with pytest.raises(MetricsError, match="metrics source mine is not configured; there is default"):
        await metrics.samples({CHAT: WINDOWS})
    metrics.close()


async def test_the_token_is_read_for_each_request(impostor: Any, tmp_path: Path) -> None:
    seen: list[str | None] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return web.json_response({"status": "success", "data": {"result": []}})

    app = web.Application()
    app.add_routes([web.post("/api/v1/query", handle)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    token = tmp_path / "token"
    metrics = PrometheusMetrics({"d": Source("d", url, 0.2, token_file=str(token))}, lambda _: "d")
    with pytest.raises(MetricsError, match=r"cannot be read: .*No such file"):
        await metrics.samples({CHAT: WINDOWS})
    for secret in ("one", "two"):
        token.write_text(f"{secret}\n")
        await metrics.samples({CHAT: WINDOWS})
        assert seen[-1] == f"Bearer {secret}"
    metrics.close()
    await runner.cleanup()
