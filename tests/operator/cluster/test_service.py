"""The operator's own metrics, logs, sources and command line."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from tests.ports import free_port
from typer.testing import CliRunner

from kvpilot_operator.adapters.metrics.sources import Source, SourcesError, load_sources
from kvpilot_operator.cli import app
from kvpilot_operator.cluster.logs import redact
from kvpilot_operator.cluster.metrics import OperatorMetrics
from kvpilot_operator.cluster.service import health
from kvpilot_operator.reconcile.queue import KeyedQueue
from kvpilot_operator.reconcile.reconciler import Reconciliation
from kvpilot_operator.status.snapshot import Key, Snapshot
from kvpilot_operator.tuning.decision import Decision, Objective, Record
from kvpilot_operator.tuning.observation import Observation, ObservedReplica
from kvpilot_operator.tuning.pace import PACES
from kvpilot_operator.tuning.policy import Objectives, Policy
from kvpilot_operator.tuning.state import Hold, TuningState

CHAT = Key("team-a", "chat")


def result(state: str, *holds: str, outcome: str = "") -> Reconciliation:
    policy = Policy(Objectives("request", {}, 0, 0, 0, 1, 1), "Auto", PACES["Fast"], {}, None)
    records = (Record("d-1", 0, "workers-up", outcome, "", None, ()),) if outcome else ()  # type: ignore[arg-type]
    decision = Decision(
        TuningState(holds=tuple(Hold(reason, "", 0) for reason in holds)),
        records=records,
        objectives=(Objective("p95", 0.95, None, None, state),),  # type: ignore[arg-type]
    )
    pods = (
        ObservedReplica("1", "a", True),
        ObservedReplica("2", "b", False, pending_reason="Unschedulable: no GPU"),
    )
    return Reconciliation(
        CHAT,
        Snapshot(CHAT, {}, 2, replicas=(), promoted=None),
        policy,
        Observation(0, pods, {}, None, 2),
        decision,
    )


def lines(metrics: OperatorMetrics) -> list[str]:
    return [
        line
        for line in metrics.text().decode().splitlines()
        if 'name="chat"' in line or "decisions_total{" in line
    ]


def test_a_look_replaces_what_was_said_of_the_resource() -> None:
    metrics = OperatorMetrics()
    metrics.reconciled(result("Breached", "Cooldown", outcome="Promoted"))
    said = lines(metrics)
    of = 'name="chat",namespace="team-a"'
    assert f'kvpilot_operator_hold{{{of},reason="Cooldown"}} 1.0' in said
    assert f'kvpilot_operator_objective_state{{{of},objective="p95",state="Breached"}} 1.0' in said
    assert f'kvpilot_operator_replicas{{{of},state="pending"}} 1.0' in said
    assert 'kvpilot_operator_decisions_total{outcome="Promoted",rule="workers-up"} 1.0' in said

    metrics.reconciled(result("Met"))
    said = lines(metrics)
    assert not [line for line in said if "hold{" in line or "Breached" in line]
    metrics.forget(CHAT)
    assert lines(metrics) == ['kvpilot_operator_decisions_total{outcome="Promoted",rule="workers-up"} 1.0']


def test_no_secret_is_ever_logged() -> None:
    event = {
        "event": "x", "admin_token": "s3cret", "Authorization": "Bearer s3cret",
        "note": "sent bearer s3cret to y", "error": "ok",
    }  # fmt: skip
    reported = json.dumps(redact(None, "", event))
    assert "s3cret" not in reported
    assert '"error": "ok"' in reported


def test_logs_are_json_lines() -> None:
    program = (
        "from kvpilot_operator.cluster import logs; import structlog, logging; logs.configure();"
        "structlog.get_logger('a').info('tick', resource='team-a/chat', token='s3cret');"
        "logging.getLogger('kopf.objects').info('Handler succeeded');"
        "logging.getLogger('b').warning('careful %s', 1)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = (json.loads(line) for line in done.stderr.splitlines())
    assert (first["event"], first["resource"], first["token"], first["level"]) == (
        "tick", "team-a/chat", "[redacted]", "info",
    )  # fmt: skip
    assert (second["event"], second["level"]) == ("careful 1", logging.getLevelName(logging.WARNING).lower())


def sources(folder: Path, text: str) -> Path:
    path = folder / "sources.yaml"
    path.write_text(text)
    return path


def test_sources_name_urls_and_intervals(tmp_path: Path) -> None:
    path = sources(
        tmp_path,
        "sources: {default: {url: 'http://p:9090/', scrapeInterval: 500ms},"
        " far: {url: 'https://q/x', caFile: /ca}}",
    )
    assert load_sources(path) == {
        "default": Source("default", "http://p:9090", 0.5),
        "far": Source("far", "https://q/x", 15.0, ca_file="/ca"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: {a: {url: p}}", "sources.a.url: .*http:// or https:// URL, got 'p'"),
        ("sources: {a: {url: 'http://p', token: x}}", "sources.a.token: unknown field"),
        ("sources: {a: {url: 'http://p', scrapeInterval: 0s}}", "scrapeInterval: .*greater than 0"),
        ("sources: {a: {url: 'http://p', scrapeInterval: often}}", "scrapeInterval: .*number"),
        ("{}", "sources: required"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_bad_sources_file_is_named_with_its_fault(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SourcesError, match=message):
        load_sources(sources(tmp_path, text))


async def test_health_fails_within_a_minute_of_the_oldest_reconcile_that_hangs() -> None:
    now, code = 1000.0, Key("team-a", "code")
    started = {CHAT: asyncio.Event(), code: asyncio.Event()}
    hanging = asyncio.Event()

    async def reconcile(key: Key) -> None:
        started[key].set()
        await hanging.wait()

    async def resync() -> None:
        pass

    queue = KeyedQueue(reconcile, resync, clock=lambda: now)
    served = asyncio.create_task(queue.run())

    async def advance(seconds: float, key: Key) -> None:
        nonlocal now
        now += seconds
        queue.enqueue(key)  # the queue itself runs on
        async with asyncio.timeout(60):
            await started[key].wait()
            while queue.idle_s > 0:  # noqa: ASYNC110 - the time of the queue, not of the test
                await asyncio.sleep(0)

    await advance(0, CHAT)
    await advance(30, code)
    await advance(29, code)
    page = health(queue)
    assert page.status == 200
    assert json.loads(page.text or "") == {"secondsSinceQueueRan": 0.0, "secondsOfLongestReconcile": 59.0}
    await advance(1, code)
    page = health(queue)
    assert page.status == 503
    assert json.loads(page.text or "") == {"secondsSinceQueueRan": 0.0, "secondsOfLongestReconcile": 60.0}
    hanging.set()
    await queue.stop()
    await served
    assert queue.oldest_reconcile_s == 0


def command(folder: Path, key: str) -> list[str]:
    """The operator's, for a cluster whose API server is not there."""
    (folder / "key").write_text(key)
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(
        "{apiVersion: v1, kind: Config, current-context: c, clusters: [{name: c, cluster: {server: 'http://127.0.0.1:9'}}],"
        " users: [{name: u, user: {}}], contexts: [{name: c, context: {cluster: c, user: u}}]}"
    )
    return [
        sys.executable, "-c", "from kvpilot_operator.cli import app; app()", "operator",
        f"--kubeconfig={kubeconfig}", f"--operator-key-file={folder / 'key'}",
        f"--sources-file={sources(folder, 'sources: {default: {url: http://127.0.0.1:9}}')}",
        f"--metrics-port={free_port()}",
    ]  # fmt: skip


def test_told_to_stop_while_it_waits_for_the_api_server_it_ends_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(command(tmp_path, "k" * 32), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            reported = next(line for line in process.stderr if "definitions_missing" in line)
            assert "127.0.0.1" in json.loads(reported)["missing"]
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "kubeconfig", "message"),
    [
        ([], "", "--kubeconfig: required outside of a cluster (Service host/port is not set.)"),
        (
            ["--kubeconfig=kubeconfig"],
            "a: [",
            "--kubeconfig: cannot use kubeconfig: while parsing a flow node",
        ),
        (["--kubeconfig=kubeconfig"], "", "--kubeconfig: cannot use kubeconfig: "),
        (
            ["--kubeconfig=kubeconfig"],
            "{a: b}",
            "kubeconfig: Invalid kube-config file. Expected key current-context",
        ),
        (
            ["--alerts-token-file=x", "--alerts-port=8080"],
            "",
            "--alerts-port: must differ from --metrics-port, got 8080 for both",
        ),
    ],
)
def test_a_start_without_a_cluster_is_shown_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], kubeconfig: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kvpilot_operator.cluster.logs.configure", lambda _: None)
    Path("kubeconfig").write_text(kubeconfig)
    result = CliRunner().invoke(app, ["operator", *arguments])
    assert result.exit_code == 2
    assert result.output.startswith("kvpilot operator: --")
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_a_command_that_cannot_run_says_why_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, "short"), capture_output=True, text=True, check=False, timeout=110
    )
    assert done.returncode == 2
    assert done.stderr.startswith("kvpilot operator: ")
    assert "at least 32 bytes are required, got 5" in done.stderr
    assert "Traceback" not in done.stderr
