"""The Prometheus adapter against a real Prometheus that scrapes small exporters, and against impostors."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tests.operator.adapters.metrics.scraping import SCRAPE_S, Exporter, Scraping, binary

from kvpilot_engine.contract import metrics as names
from kvpilot_operator.adapters.metrics.prometheus import PrometheusMetrics
from kvpilot_operator.adapters.metrics.sources import Source
from kvpilot_operator.ports import MetricsError
from kvpilot_operator.status.snapshot import Key
from kvpilot_operator.tuning.observation import Counts, Sample, SourceProblem

WINDOWS = {"short": 1.0, "long": 5.0}
CHAT = Key("team-a", "chat")
CODE = Key("team-b", "code")


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
        {"default": Source("default", prometheus.url, SCRAPE_S)}, lambda _: "default", timeout_s=10.0
    )
    yield adapter
    adapter.close()


async def until(
    read: Callable[[], Awaitable[dict[Key, dict[str, Sample]]]],
    good: Callable[[dict[Key, dict[str, Sample]]], bool],
    seconds: float = 40.0,
) -> dict[Key, dict[str, Sample]]:
    """Read until the answer is good; the last answer is shown when it never is."""
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
        return sample is not None and sample.coverage_s >= 0.9 * WINDOWS["long"]

    return check


def counts(found: Mapping[Key, Mapping[str, Sample]], uid: str, window: str) -> Counts:
    """What the window of a pod of `chat` counts; nothing without a sample."""
    sample = found.get(CHAT, {}).get(uid)
    return Counts() if sample is None else sample.windows.get(window, Counts())


def whole(
    found: Mapping[Key, Mapping[str, Sample]], uid: str, windows: Mapping[str, float], scrape_s: float
) -> bool:
    """Hardly a scrape is missing, and none of the shortest window: a crowded machine scrapes late."""
    sample = found.get(CHAT, {}).get(uid)
    return (
        sample is not None
        and sample.scrape_s < 1.1 * scrape_s
        and all(
            abs(counts(found, uid, name).replica_seconds - length) <= 2 * scrape_s
            for name, length in windows.items()
        )
    )


async def burst(
    read: Callable[[], Awaitable[dict[Key, dict[str, Sample]]]],
    exporter: Exporter,
    windows: Mapping[str, float],
    scrape_s: float = SCRAPE_S,
) -> dict[str, Sample]:
    """The engines' samples right after 100 requests, read while no scrape is missing."""

    def idle(found: Mapping[Key, Mapping[str, Sample]]) -> bool:
        return (
            whole(found, exporter.uid, windows, scrape_s) and not counts(found, exporter.uid, "long").arrivals
        )

    for _ in range(5):
        await until(read, idle)
        exporter.finished(100)
        over = time.monotonic() + 2 * windows["long"]  # by then no window shows them any more

        def judged(found: Mapping[Key, Mapping[str, Sample]], over: float = over) -> bool:
            return counts(found, exporter.uid, "short").judged > 0 or time.monotonic() > over

        found = await until(read, judged)
        if judged(found, math.inf) and whole(found, exporter.uid, windows, scrape_s):
            return found[CHAT]
    pytest.fail("five times, Prometheus did not scrape in time")


@pytest.mark.slow
async def test_counts_resets_and_staleness(prometheus: Scraping, metrics: PrometheusMetrics) -> None:
    async def read() -> dict[Key, dict[str, Sample]]:
        return await metrics.samples({CHAT: WINDOWS})

    pod = prometheus.exporters["chat-1"]
    young = (await until(read, lambda found: pod.uid in found[CHAT]))[CHAT][pod.uid]
    # Unless a busy machine asked so late that it is young no more.
    assert young.coverage_s < WINDOWS["long"] or time.monotonic() > pod.scraped_at + WINDOWS["short"]

    sample = (await burst(read, pod, WINDOWS))[pod.uid]
    for window, length in WINDOWS.items():
        seen = sample.windows[window]
        assert seen.completed == pytest.approx(100, rel=2 * SCRAPE_S / length + 0.05), window
        assert seen.attainment("request", 0.25) == 0.0
        assert seen.attainment("request", 0.3) == pytest.approx(1.0)
    assert sample.gauges.generation == 7
    assert sample.age_s < WINDOWS["short"], "a scrape of this window is the last one"

    for _ in range(5):
        pod.reset()
        pod.finished(40)
        # Together with the 100 of before; alone if the machine was too busy to see them together.
        after = await until(read, lambda found: not 60 <= counts(found, pod.uid, "long").arrivals <= 120)
        arrivals = counts(after, pod.uid, "long").arrivals
        if arrivals > 60 and whole(after, pod.uid, WINDOWS, SCRAPE_S):
            break
        await burst(read, pod, WINDOWS)
    assert arrivals == pytest.approx(140, rel=0.15)

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


async def test_a_pod_that_exports_no_optional_metric_has_a_sample_without_it(
    prometheus: Scraping, metrics: PrometheusMetrics
) -> None:
    pod = prometheus.exporters["code-1"]
    for series in [s for s in pod.values if s.startswith(names.PREFETCH_BLOCKS_TOTAL)]:
        del pod.values[series]

    def used(found: Mapping[Key, Mapping[str, Sample]]) -> float | None:
        return found[CODE][pod.uid].windows["short"].prefetch_used

    found = await until(
        lambda: metrics.samples({CODE: WINDOWS}),
        lambda found: settled(pod.uid, CODE)(found) and used(found) is None,
    )
    assert found[CODE][pod.uid].windows["short"].evicted_pages == 0.0


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
        # It never answers.
        with pytest.raises(MetricsError, match=r"default \(http://.*\) did not answer within 0\.5 s"):
            await metrics.samples({CHAT: WINDOWS})
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
    message = "window short of 10 s is below 4 scrape intervals of metrics source slow (15 s)"
    with pytest.raises(MetricsError) as raised:
        await metrics.samples({CHAT: {"short": 10.0, "long": 60.0}})
    assert raised.value.problem == SourceProblem("ScrapeTooSlow", message)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "origins",
    [
        [{}, {}],
        [{"prometheus_replica": "a"}, {"prometheus_replica": "b"}],
        [{"endpoint": "http"}, {"endpoint": "http", "service": "chat"}],
    ],
    ids=["two jobs", "a highly available pair", "two monitors"],
)
async def test_an_engine_that_is_scraped_twice_counts_once(
    tmp_path: Path, origins: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    found, sample = await measured_apart(tmp_path, SCRAPE_S, origins)
    assert set(found) == {"uid-chat-1"}
    assert sample.gauges.waiting == 4.0
    assert sample.windows["long"].arrivals == pytest.approx(100, rel=0.2)
    assert sample.windows["long"].attainment("request", 0.3) == pytest.approx(1.0)
    assert capsys.readouterr().out.count("duplicate_series") == 1


@pytest.mark.slow
async def test_windows_are_covered_by_the_scrapes_as_they_are(tmp_path: Path) -> None:
    _, sample = await measured_apart(tmp_path, 2 * SCRAPE_S, [{}])
    assert sample.scrape_s == pytest.approx(2 * SCRAPE_S, rel=0.35)
    assert sample.coverage_s == 15 * 2 * SCRAPE_S


async def measured_apart(
    folder: Path, scrape_s: float, origins: list[dict[str, str]]
) -> tuple[dict[str, Sample], Sample]:
    """The samples of one engine in a Prometheus of its own, right after 100 requests."""
    exporter = Exporter("chat-1", CHAT)
    running = Scraping.below(folder, {"chat-1": exporter})
    running.start(scrape_s, origins)
    metrics = PrometheusMetrics(
        {"default": Source("default", running.url, SCRAPE_S)}, lambda _: "default", timeout_s=10.0
    )
    windows = {"short": 5 * scrape_s, "long": 15 * scrape_s}
    try:
        exporter.values[names.REQUESTS_WAITING] = 4.0

        async def read() -> dict[Key, dict[str, Sample]]:
            return await metrics.samples({CHAT: windows})

        found = await burst(read, exporter, windows, scrape_s)
        return found, found[exporter.uid]
    finally:
        metrics.close()
        running.stop()
