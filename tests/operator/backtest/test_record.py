"""Recordings: read from a real Prometheus, written, and replayed; gaps are printed and never filled."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.operator.adapters.metrics.scraping import Exporter, Scraping, binary
from tests.operator.cli.runs import kvpilot, refused, started

from kvpilot_engine.contract import metrics as names
from kvpilot_operator.adapters.metrics.sources import Source
from kvpilot_operator.backtest import record
from kvpilot_operator.backtest.devices import Device
from kvpilot_operator.backtest.record import RecordOptions, run_record
from kvpilot_operator.backtest.recording import (
    Interval,
    StepWork,
    described_gaps,
    lines_of,
    read_recording,
    recording_of,
)
from kvpilot_operator.backtest.scenes import LoadSpec, scene_of
from kvpilot_operator.backtest.traces import recorded
from kvpilot_operator.load.workload import LoadError
from kvpilot_operator.ports import MetricsError
from kvpilot_operator.resource.load import load_document
from kvpilot_operator.status.snapshot import Key

CHAT = Key("team-a", "chat")
STEP_S = 5


def write(path: Path, *intervals: Interval) -> Path:
    path.write_text(
        "".join(f"{line}\n" for line in lines_of(recording_of("team-a/chat", 0.0, 60.0, intervals)))
    )
    return path


def busy(at: float, arrivals: float = 600.0) -> Interval:
    return Interval(at, arrivals, 500.0, 400.0, 20.0)


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Scraping]:
    binary()  # before any thread: a skip here must leave nothing running
    pods = {pod: Exporter(pod, CHAT) for pod in ("chat-1", "chat-2")}
    running = Scraping.below(tmp_path, pods)
    # Two servers scrape each pod, as a highly available pair does.
    running.start(origins=({"prometheus": "a"}, {"prometheus": "b"}))
    yield running
    running.stop()


TOKENS = {
    names.QUERY_TOKENS_TOTAL: 500,
    names.CEILING_TOKENS_TOTAL: 400,
    names.OUTPUT_TOKENS_TOTAL: 20,
    f'{names.HIT_TOKENS_TOTAL}{{tier="pool"}}': 200,
    f'{names.HIT_TOKENS_TOTAL}{{tier="host"}}': 100,
    names.STEPS_TOTAL: 15,
    names.STEP_ROWS_TOTAL: 20,
    names.STEP_BUSY_SECONDS_TOTAL: 0.5,
}
"""Of each request: prompt, of which a part could be cached, and new; hits by tier; steps and their time."""


@pytest.mark.slow
def test_recording_holds_what_prometheus_counted(
    prometheus: Scraping, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, deadline = tmp_path / "chat.jsonl", time.monotonic() + 60
    options = RecordOptions("chat", "team-a", prometheus.url, out, since="120s", step=STEP_S)
    known: list[Interval] = []
    while time.monotonic() < deadline and sum(item.arrivals > 0 for item in known) < 3:
        for exporter in prometheus.exporters.values():
            exporter.finished(10, TOKENS)
        # What is waited for is the passing of scrapes: each round adds the same number of requests.
        time.sleep(0.25)
        if run_record(options) == 0:
            known = [item for item in read_recording(out).intervals if not item.gap]
    full = max(known, key=lambda item: item.arrivals)
    assert full.prompt == pytest.approx(500, rel=0.05)
    assert full.cached == pytest.approx(400, rel=0.05)
    assert full.output == pytest.approx(20, rel=0.05)
    rounds = full.arrivals / 20
    assert 2 <= rounds <= STEP_S / 0.25 * 1.2, "the second server's counts are not added"
    assert full.work is not None
    for name, each in {
        "admitted": 1,
        "answered": 1,
        "hit": 300,
        "steps": 15,
        "rows": 20,
        "busy": 0.5,
    }.items():
        assert getattr(full.work, name) == pytest.approx(full.arrivals * each, rel=0.05), name
    recording = read_recording(out)
    assert (recording.resource, recording.step) == ("team-a/chat", STEP_S)
    assert recording.gaps and recording.gaps[0][0] == 0.0, "before Prometheus ran nobody counted"
    printed = capsys.readouterr().out
    assert "gap         no data from 0 s to" in printed
    assert "replay it with `kvpilot backtest --trace" in printed


def test_recording_without_any_data_is_refused(
    prometheus: Scraping, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, deadline = tmp_path / "none.jsonl", time.monotonic() + 60
    options = RecordOptions("no-such", "team-a", prometheus.url, out, since="30s", step=STEP_S)
    while (code := run_record(options)) == 1 and time.monotonic() < deadline:
        time.sleep(0.2)  # Prometheus starts
    assert code == 2
    assert "team-a/no-such" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


class Partial:
    """A source of engines that count no steps."""

    def __init__(self, source: Source, timeout_s: float) -> None:
        """It is asked nothing yet."""

    async def query_range(self, promql: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        return [] if "_steps_total" in promql else [{"values": [(start, "7"), (end, "7")]}]

    def close(self) -> None:
        """Nothing is open."""


def test_engines_that_count_no_steps_are_recorded_without_their_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "PrometheusSource", Partial)
    out = tmp_path / "chat.jsonl"
    assert run_record(RecordOptions("chat", "team-a", "http://p", out, since="120s")) == 0
    assert [(item.gap, item.work) for item in read_recording(out).intervals] == [(False, None)] * 2


class Silent:
    """A source that answers for a part of the time only: ``POINTS`` is 2, and each part is 120 s long."""

    parts: tuple[bool, ...] = ()

    def __init__(self, source: Source, timeout_s: float) -> None:
        self.asked: list[float] = []

    async def query_range(self, promql: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        self.asked += [start] if start not in self.asked else []
        if not self.parts[len(self.asked) - 1]:
            raise MetricsError("metrics source prometheus did not answer within 60 s")
        return [{"values": [(start + index * step, "7") for index in range(round((end - start) / step) + 1)]}]

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize(
    ("parts", "gaps"),
    [
        ((True, True), []),
        ((False, True), ["gap         no data from 0 s to 120 s"]),
        ((True, False), ["gap         no data from 120 s to 240 s"]),
    ],
)
def test_time_for_which_the_source_is_silent_is_a_gap_of_the_recording(
    parts: tuple[bool, ...],
    gaps: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Silent, "parts", parts)
    monkeypatch.setattr(record, "PrometheusSource", Silent)
    monkeypatch.setattr(record, "POINTS", 2)
    out = tmp_path / "chat.jsonl"
    assert run_record(RecordOptions("chat", "team-a", "http://p", out, since="240s")) == 0
    assert [item.gap for item in read_recording(out).intervals] == [not part for part in parts for _ in "ab"]
    printed = capsys.readouterr()
    assert [line for line in printed.out.splitlines() if line.startswith("gap")] == gaps
    why = "metrics source prometheus did not answer within 60 s"
    told = f"kvpilot record: {why}; what it did not answer for is a gap"
    assert printed.err.splitlines() == [told] * len(gaps)


def test_source_that_is_silent_from_start_to_end_gives_no_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Silent, "parts", (False, False))
    monkeypatch.setattr(record, "PrometheusSource", Silent)
    monkeypatch.setattr(record, "POINTS", 2)
    out = tmp_path / "chat.jsonl"
    assert run_record(RecordOptions("chat", "team-a", "http://p", out, since="240s")) == 1
    assert capsys.readouterr().err == (
        "kvpilot record: metrics source prometheus did not answer within 60 s\n"
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--url", "http://127.0.0.1:9"), 1, "metrics source prometheus (http://127.0.0.1:9) cannot be read"),
        (("--url", "prometheus:9090"), 2, "--url: must be an http:// or https:// URL"),
        (
            ("--url", "http://p", "--since", "soon"),
            2,
            "--since: must be a duration before now (24h) or an RFC",
        ),
        (("--url", "http://p", "--since", "1h", "--until", "2h"), 2, "--since: must be 1 to 100000 steps"),
        (("--url", "http://p", "--step", "1"), 2, "--step: must be a whole number from 5 to 3600, got 1"),
        (("--url", "http://p", "-n", 'x"}'), 2, "--namespace: must be a DNS label such as chat, got"),
    ],
)
def test_invalid_options_are_one_line(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = kvpilot("record", "chat", "--out", str(tmp_path / "r.jsonl"), *arguments)
    assert (done.exit_code, done.stderr.count("\n")) == (code, 1), done.stderr
    assert message in done.stderr


def test_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    work = StepWork(600.0, 598.0, 240_000.0, 9800.0, 31_000.5, 41.25)
    worked = replace(busy(240.0), work=work)
    intervals = (busy(0.0), Interval(60.0, gap=True), Interval(120.0), busy(180.0, 12.5), worked)
    found = read_recording(write(tmp_path / "r.jsonl", *intervals))
    assert found.intervals == intervals
    assert (found.resource, found.start, found.step) == ("team-a/chat", "1970-01-01T00:00:00Z", 60.0)


def test_gaps_are_shown_and_hold_no_request(tmp_path: Path) -> None:
    gap = [Interval(60.0 * index, gap=True) for index in (2, 3, 5)]
    path = write(tmp_path / "r.jsonl", busy(0), busy(60), *gap[:2], busy(240), gap[2], busy(360))
    assert described_gaps(read_recording(path)) == [
        "no data from 120 s to 240 s: no requests are played there",
        "no data from 300 s to 360 s: no requests are played there",
    ]
    times = [request.at for request in recorded(path, 1)]
    assert times == sorted(times)
    assert len(times) == 4 * 600
    assert not any(120 <= at < 240 or 300 <= at < 360 for at in times)


def test_replay_has_the_recorded_sizes(tmp_path: Path) -> None:
    requests = recorded(write(tmp_path / "r.jsonl", *(busy(60.0 * index) for index in range(10))), 3)
    count = len(requests)
    assert sum(item.prompt for item in requests) / count == pytest.approx(500, rel=0.05)
    assert sum(item.out for item in requests) / count == pytest.approx(20, rel=0.05)
    assert sum(item.cached for item in requests) / count == pytest.approx(400, rel=0.05)
    assert all(item.cached <= 0.98 * item.prompt for item in requests)
    assert recorded(tmp_path / "r.jsonl", 3) == requests != recorded(tmp_path / "r.jsonl", 4)


def test_backtest_replays_a_recording_and_names_its_gaps(tmp_path: Path) -> None:
    intervals = [busy(60.0 * index) for index in range(6)]
    intervals[3] = Interval(180.0, gap=True)
    path, out = write(tmp_path / "r.jsonl", *intervals), tmp_path / "out.json"
    done = started(
        "backtest", "--trace", str(path), "--pace", "Fast", "--seeds", "1", "--against", "do-nothing",
        "--json", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no data from 180 s to 240 s: no requests are played there" in done.stdout
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    assert [row["controller"] for row in rows] == ["kvpilot", "do-nothing"]


HEAD = '{"kvpilotRecording": 1, "resource": "a/b", "step": 60}\n'
FULL = '{"at": 0, "arrivals": 5, "prompt": 10, "cached": 5, "output": 4}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD, "holds no interval with data"),
        (HEAD + '{"at": 0, "gap": true}\n', "holds no interval with data"),
        (HEAD.replace("1,", "2,"), ":1: kvpilotRecording: must be 1, got 2"),
        (HEAD.replace("60", "0"), ":1: step: must be a number from 1 to 1e+12, got 0"),
        (HEAD + "{", ":2: not JSON"),
        (HEAD + FULL.replace("5,", "-5,", 1), ":2: arrivals: must be a number from 0 to 1e+12, got -5"),
        (
            HEAD + FULL.replace(', "output": 4', ""),
            ":2: output: must be a number from 1 to 1e+12, got nothing",
        ),
        (HEAD + FULL + FULL, ":3: at: must be 60, one step after the line above, got 0"),
        (
            HEAD + FULL + FULL.replace('"at": 0', '"at": 120'),
            ":3: at: must be 60, one step after the line above, got 120; a gap has a line of its own",
        ),
        (HEAD + FULL.replace("10", "NaN"), ":2: prompt: must be a number"),
        (HEAD + FULL.replace("}", ', "work": 7}'), ":2: work: must be a JSON object, got 7"),
        (
            HEAD + FULL.replace("}", ', "work": {"admitted": 5, "answered": 5, "hit": -1}}'),
            ":2: work: hit: must be a number from 0 to 1e+12, got -1",
        ),
    ],
)
def test_broken_recording_names_file_line_and_fault(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(LoadError) as error:
        scene_of(load_document(Path("examples/production.yaml")), LoadSpec(trace=path))
    assert str(error.value).startswith(f"recording {path}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


IDLE = '{{"at": {0}, "arrivals": 0, "prompt": 0, "cached": 0, "output": 0}}\n'
LATE = "".join(f'{{"at": {60 * index}, "gap": true}}\n' for index in range(6))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "".join(IDLE.format(60 * index) for index in range(6)), "holds no request"),
        (
            HEAD + LATE + FULL.replace('"at": 0', '"at": 360'),
            "no request arrives in its first 300 s (--duration); the first one arrives after 3",
        ),
        (
            HEAD + "".join(IDLE.format(60 * index) for index in range(200)) + "\udcff",
            "cannot be read: 'utf-8' codec can't decode byte 0xff in position ",
        ),
    ],
    ids=["idle", "begins late", "bytes after the first portion"],
)
def test_recording_that_cannot_be_played_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    line = refused("backtest", "--trace", str(path), "--duration", "300")
    assert line.startswith(f"kvpilot backtest: recording {path}: {message}")


LAW = Device(base_s=0.004, row_s=0.0006, prefill_s=0.00002, context_s=0.3e-6, attend_s=0.05e-6)


def worked(
    at: float, requests: float, rows: float, *, prompt: float = 500.0, out: float = 20.0, slower: float = 1.0
) -> Interval:
    """A minute of engines with the costs of `LAW`, whose cache serves half of what it could."""
    hit, steps = 200.0 * requests, out * requests / rows
    seconds = LAW.base_s * steps + LAW.row_s * rows * steps + LAW.prefill_s * (prompt * requests - hit)
    seconds += LAW.context_s * ((prompt + out / 2) * (out - 1) * requests + hit)
    seconds += LAW.attend_s * (prompt * requests - hit) * (200.0 + (prompt - 200.0) / 2)
    work = StepWork(requests, requests, hit, steps, rows * steps, seconds * slower)
    return Interval(at, requests, prompt, 400.0, out, work=work)


SHAPES = (
    (300, 2, 500, 20), (600, 3, 450, 26), (900, 5, 550, 16), (1200, 8, 480, 22), (400, 2.5, 600, 24),
    (800, 4, 420, 14), (700, 3, 520, 18), (1000, 6, 470, 28), (500, 3, 560, 12), (1100, 7, 430, 19),
    (650, 2, 800, 10), (750, 5, 410, 40), (850, 4, 700, 30), (450, 8, 600, 15),
)  # fmt: skip
"""Requests, rows, prompt and answer by interval."""


def minutes(slower: Sequence[float] = (1.0,) * len(SHAPES)) -> list[Interval]:
    return [
        worked(60.0 * index, requests, rows, prompt=prompt, out=out, slower=factor)
        for index, ((requests, rows, prompt, out), factor) in enumerate(zip(SHAPES, slower, strict=True))
    ]


def test_device_of_a_recording_is_that_of_its_engines(tmp_path: Path) -> None:
    path, manifest = write(tmp_path / "r.jsonl", *minutes()), load_document(Path("examples/production.yaml"))
    scene = scene_of(manifest, LoadSpec(trace=path))
    assert scene.device_name == "recorded"
    assert scene.device_why == "14 intervals; a fit to half of them misses the others by 0.0%"
    for name in ("base_s", "row_s", "prefill_s", "context_s", "attend_s"):
        assert getattr(scene.device, name) == pytest.approx(getattr(LAW, name), rel=0.02), name
    assert (scene.device.hits, scene.device.noise) == (pytest.approx(0.5), Device.noise)
    assert scene.work.cached == pytest.approx(200, rel=0.1), "what the cache served is not computed again"
    fitting = scene_of(manifest, LoadSpec(trace=path), "fitting")
    assert (fitting.device_name, fitting.device_why) == ("fitting", "as asked for")
    assert fitting.device.base_s != pytest.approx(LAW.base_s, rel=0.2)


def test_backtest_says_which_device_it_plays(tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    done = started(
        "backtest", "--trace", str(write(tmp_path / "r.jsonl", *minutes())), "--pace", "Fast", "--seeds", "1",
        "--against", "do-nothing", "--json", str(out), "--report", str(page), "--duration", "300",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [told] = [line for line in done.stdout.splitlines() if line.startswith("device: ")]
    assert told == (
        "device: calibrated from the recording (14 intervals; a fit to half of them misses the others by "
        "0.0%): a step 4 ms, each row 0.6 ms, a prompt token 0.02 ms, a token that a row attends to 0.3 us, "
        "one that a prompt token attends to 0.05 us; the cache serves 50% of what it could"
    )  # fmt: skip
    assert told in page.read_text()
    device = json.loads(out.read_text())["settings"]["device"]
    assert (device["name"], device["base_s"]) == ("recorded", pytest.approx(LAW.base_s, rel=0.02))


UNEVEN = (1.0, 3.0) * 7
"""Every other minute the machine was three times slower."""


@pytest.mark.parametrize(
    ("intervals", "why"),
    [
        (
            [busy(60.0 * index) for index in range(12)],
            "at least 10 intervals with steps of the engines are needed, it has 0",
        ),
        (
            [worked(60.0 * index, 600, 3) for index in range(12)],
            "windows: they are too alike to separate steps, rows, context of rows, "
            "computed prompt tokens, context of prompts",
        ),
        (
            minutes(UNEVEN),
            "a fit to half of its intervals misses the time in steps of the others by 67%, allowed are 20%",
        ),
    ],
    ids=["no steps", "alike", "uneven"],
)
def test_recording_that_tells_no_device(tmp_path: Path, intervals: list[Interval], why: str) -> None:
    path = write(tmp_path / "r.jsonl", *intervals)
    scene = scene_of(load_document(Path("examples/production.yaml")), LoadSpec(trace=path))
    assert (scene.device_name, scene.device_why) == ("fitting", f"recording {path}: {why}")
    done = kvpilot("backtest", "--trace", str(path), "--device", "recorded")
    line = (
        f"kvpilot backtest: --device: recorded is not possible: recording {path}: {why}; allowed: fitting\n"
    )
    assert (done.exit_code, done.stderr) == (2, line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--load", "step", "--device", "recorded"),
            "--device: recorded is not possible: the load is no recording of `kvpilot record`; "
            "allowed: fitting",
        ),
        (("--aa", "1", "--device", "fitting"), "--device: needs --trace or --load"),
    ],
)
def test_device_of_a_load_without_a_recording(arguments: tuple[str, ...], message: str) -> None:
    done = kvpilot("backtest", *arguments)
    assert (done.exit_code, done.stderr) == (2, f"kvpilot backtest: {message}\n")
