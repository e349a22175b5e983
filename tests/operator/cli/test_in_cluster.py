"""The commands against an API server: what they ask of it, and its refusals in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from tests.operator.cli.api_server import ApiServer
from tests.operator.cli.runs import manifest, ok, records, refused, running, switched_off

from kvpilot_operator.resource import KVCacheOverride


def test_override_is_created_as_the_user_of_the_cluster(api: ApiServer) -> None:
    output = ok("pause", "chat", "--for", "2h")
    [item] = api.of("kvcacheoverrides")
    assert KVCacheOverride.parse(item).spec.kind == "pause"
    assert (item["metadata"]["namespace"], item["spec"]["by"]) == ("team-a", "ana@example.com")
    assert item["spec"]["ttl"] == "2h"
    assert output.splitlines()[0].startswith("chat in team-a: tuning is paused; bounds and boosts go on")
    assert output.splitlines()[1] == "End it earlier: kvpilot resume chat -n team-a"
    assert ok("resume", "chat") == (
        f"chat in team-a: the pause by ana@example.com is ended ({item['metadata']['name']}).\n"
    )
    assert api.of("kvcacheoverrides") == []


def test_every_command_that_writes_works_in_the_cluster(api: ApiServer) -> None:
    ok("pin", "chat", "numWorkers", "16")
    ok("boost", "chat", "3", "-n", "team-a")
    ok("rollback", "chat", "--to", "5")
    assert [item["spec"]["target"] for item in api.of("kvcacheoverrides")] == ["chat"] * 3
    ok("unpin", "chat", "numWorkers")
    ok("unboost", "chat")
    assert [KVCacheOverride.parse(item).spec.kind for item in api.of("kvcacheoverrides")] == ["rollback"]


def test_decision_that_waits_is_shown_and_approved(api: ApiServer) -> None:
    document = manifest()
    document["metadata"]["namespace"] = "team-a"
    document["spec"]["tuning"]["mode"] = "Approve"
    pending = {
        "id": "d-0042",
        "rule": "workers-up",
        "values": [{"knob": "numWorkers", "from": "8", "to": "16"}],
        "since": "2026-11-22T09:30:00Z",
        "expires": "2026-11-22T10:30:00Z",
    }
    document["status"] = {**document["status"], "tuning": {"state": "Observe", "pending": [pending]}}
    api.add("kvcachedeployments", document)
    line = "d-0042 (workers-up): numWorkers 8 -> 16, waits until 2026-11-22T10:30:00Z"
    assert f"  Pending     {line}: kvpilot approve chat d-0042" in ok("status", "chat")
    assert "d-0042 pending" in ok("status")
    assert ok("approve", "chat", "d-0042").startswith("chat in team-a: d-0042 is approved, until ")
    assert refused("approve", "chat", "d-0041") == (
        "kvpilot approve: d-0041 is not pending; pending now: d-0042"
    )


def test_status_and_history_read_the_cluster(api: ApiServer) -> None:
    other = copy.deepcopy(manifest("code"))
    other["metadata"]["namespace"] = "team-b"
    api.add("kvcachedeployments", other)
    path = "/api/v1/namespaces/team-a/configmaps/chat-decisions"
    api.objects[path] = {"data": {"decisions.jsonl": "\n".join(map(json.dumps, records()))}}
    assert [line.split()[0] for line in ok("status").splitlines()] == ["NAME", "chat"]
    assert [line.split()[1] for line in ok("status", "-A").splitlines()] == ["NAME", "chat", "code"]
    assert [line.split()[0] for line in ok("status", "-n", "team-b").splitlines()] == ["NAME", "code"]
    assert [line.split()[1] for line in ok("history", "chat").splitlines()[:3]] == ["ID", "d-0002", "d-0003"]
    assert "d-0003  Promoted by workers-up" in ok("explain", "chat")


def test_kill_switch_of_the_operator_is_shown_once_below_the_table(api: ApiServer) -> None:
    why = "ConfigMap ops/kvpilot-tuning says tuning: off, by ana (incident 4711)"
    for name in ("chat", "code"):
        document = manifest(name, switched_off(why))
        document["metadata"]["namespace"] = "team-a"
        api.add("kvcachedeployments", document)
    heading, chat, code, last = ok("status").splitlines()
    assert (heading.split()[0], chat.split()[0], code.split()[0]) == ("NAME", "chat", "code")
    assert last.startswith(f"Tuning is off since 2026-11-22T09:30:00Z: {why}; ")
    assert f"  Tuning      off since 2026-11-22T09:30:00Z: {why}; " in ok("status", "chat")


@pytest.mark.parametrize(
    ("forbidden", "command", "line"),
    [
        (
            ("POST", "kvcacheoverrides"),
            "pause chat --by x",
            "pause: POST /apis/kvpilot.io/v1alpha1/namespaces/team-a/kvcacheoverrides: 403 "
            'kvcacheoverrides.kvpilot.io is forbidden: User "ana" cannot post resource',
        ),
        (
            ("GET", "kvcachedeployments"),
            "status",
            "status: GET /apis/kvpilot.io/v1alpha1/namespaces/team-a/kvcachedeployments: 403 "
            'kvcachedeployments.kvpilot.io is forbidden: User "ana" cannot get resource',
        ),
    ],
)
def test_who_is_not_allowed_is_shown_in_one_line(
    api: ApiServer, forbidden: tuple[str, str], command: str, line: str
) -> None:
    api.forbidden.add(forbidden)
    assert refused(*command.split()) == f"kvpilot {line}"


def test_user_who_may_not_review_himself_is_the_one_of_the_kubeconfig(api: ApiServer) -> None:
    api.forbidden.add(("POST", "selfsubjectreviews"))
    ok("pause", "chat")
    assert api.of("kvcacheoverrides")[0]["spec"]["by"] == "ana"


def test_unknown_name_lists_those_of_the_namespace(api: ApiServer) -> None:
    line = refused("boost", "chta", "3", "-n", "team-a")
    assert line == "kvpilot boost: no resource chta in namespace team-a; there are: chat"


def test_cluster_that_does_not_answer_is_one_line(api: ApiServer) -> None:
    api.shutdown()
    api.server_close()
    assert "namespace team-a: GET /apis/kvpilot.io" in refused("pause", "chat")


def turned(path: Path) -> None:
    """The kubeconfig with the cluster that does not answer as the current one."""
    path.write_text(path.read_text().replace("current-context: here", "current-context: nowhere"))


def test_context_is_another_cluster_than_the_current_one(api: ApiServer, tmp_path: Path) -> None:
    turned(tmp_path / "kubeconfig")
    assert "127.0.0.1:9" in refused("status")
    assert [line.split()[0] for line in ok("status", "--context", "here").splitlines()] == ["NAME", "chat"]
    output = ok("pause", "chat", "--context", "here")
    assert output.splitlines()[1] == "End it earlier: kvpilot resume chat -n team-a --context here"
    [item] = api.of("kvcacheoverrides")
    assert item["metadata"]["namespace"] == "team-a", "of the context"
    assert item["spec"]["by"] == "ana@example.com"


def test_context_leaves_local_runs_aside(api: ApiServer, tmp_path: Path) -> None:
    with running(tmp_path, manifest()):
        assert ok("status", "chat").startswith("chat in default: ")
        assert ok("status", "chat", "--context", "here").startswith("chat in team-a: ")
        assert len(ok("status", "--context", "here").splitlines()) == 2


EVERY_COMMAND = (
    "status",
    "status chat",
    "history chat",
    "top chat",
    "explain chat",
    "export chat",
    "pause chat",
    "resume chat",
    "approve chat d-0001",
    "pin chat numWorkers 8",
    "unpin chat numWorkers",
    "boost chat 3",
    "unboost chat",
    "rollback chat",
)


@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_unknown_context_is_one_line_with_those_that_there_are(api: ApiServer, command: str) -> None:
    words = command.split()
    line = f"kvpilot {words[0]}: --context: must be one of here, nowhere, got hree"
    assert refused(*words, "--context", "hree") == line
    assert refused(*words, "--context", "here", "--run", "x") == (
        f"kvpilot {words[0]}: --context: cannot go with --run, got here"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "just text",
        "contexts: 3",
        "contexts: [{name: here}]",
        "contexts: [3]",
        "users: {}\ncontexts: [{name: here, context: 3}]",
    ],
)
def test_file_that_is_no_kubeconfig_is_one_line(
    api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = tmp_path / "other"
    path.write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(path))
    assert refused("status", "--context", "here") == f"kvpilot status: --context: {path} is no kubeconfig"
    assert refused("pause", "chat").startswith("kvpilot pause: no resource chat: no cluster to ask (")


def test_kubeconfig_without_a_current_context_needs_one(api: ApiServer, tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(path.read_text().replace("current-context: here", ""))
    assert "no cluster to ask (" in refused("status")
    assert ok("status", "chat", "--context", "here").startswith("chat in team-a: ")
