"""The parts of the test cluster that need no cluster: hashes, configurations, processes, packages."""

import json
import signal
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from scripts.cluster import __main__ as command
from scripts.cluster import build, control_plane, kind, monitoring, node, packages, process, state
from scripts.cluster.archive import write_archive
from scripts.cluster.console import ClusterError, MissingPackagesError
from scripts.cluster.layout import Layout


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    (tmp_path / "etcd").mkdir()
    (tmp_path / "etcd" / "go.mod").write_text("module x\n")
    (tmp_path / "etcd" / "go.sum").write_text("a v1 h1:x\n")
    return tmp_path


def test_every_recipe_is_pinned_and_names_its_programs():
    for recipe in (*build.EVERYTHING, *build.WITH_DOCKER):
        assert recipe.key() == recipe.key()
        assert (build.PINS / recipe.name / "go.sum").exists()
    names = [name for recipe in build.EVERYTHING for name in recipe.programs]
    assert {"etcd", "kube-apiserver", "kubelet", "coredns", "helm", "promtool", "amtool"} <= set(names)
    assert len(names) == len(set(names))


def test_a_changed_pin_or_flag_is_another_build(pins: Path):
    key = build.ETCD.key(pins)
    assert replace(build.ETCD, tags="other").key(pins) != key
    assert build.ETCD.key(pins) == key
    (pins / "etcd" / "go.sum").write_text("a v2 h1:y\n")
    assert build.ETCD.key(pins) != key


def test_the_build_command_is_reproducible():
    line = " ".join(build.build_command(build.KUBERNETES, Path("go"), Path("/out")))
    assert "-mod=readonly -buildvcs=false" in line
    assert "component-base/version.gitVersion=v1.37.1" in line
    assert line.endswith("k8s.io/kubernetes/cmd/kubectl")


def test_what_is_built_is_not_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "find_go", lambda cache: pytest.fail("Go was asked for"))
    (tmp_path / "go" / f"etcd-{build.ETCD.key()}").mkdir(parents=True)
    programs = build.build_all(tmp_path, [build.ETCD])
    assert programs == {"etcd": tmp_path / "go" / f"etcd-{build.ETCD.key()}" / "etcd"}


def test_prometheus_takes_engine_and_operator_pods_by_their_ports():
    config = json.loads(monitoring.prometheus_config(Path("/k"), Path("/rules")))
    (job,) = config["scrape_configs"]
    (discovery,) = job["kubernetes_sd_configs"]
    assert discovery["kubeconfig_file"] == "/k"
    assert discovery["selectors"] == [{"role": "pod", "label": "app.kubernetes.io/part-of=kvpilot"}]
    targets = {rule["target_label"] for rule in job["relabel_configs"] if "target_label" in rule}
    assert targets == {"namespace", "pod", "pod_uid", "kvpilot_name", "component"}
    assert config["rule_files"] == ["/rules/*.yaml"]
    assert config["global"]["scrape_interval"] == config["global"]["evaluation_interval"] == "1s"


def test_every_path_of_the_node_is_below_the_cache(tmp_path: Path):
    layout = Layout(tmp_path)
    toml = node.containerd_config(layout, "pause:1")
    paths = [line.split('"')[1] for line in toml.splitlines() if ' = "/' in line]
    assert [path for path in paths if not path.startswith(str(tmp_path))] == [node.CNI_PLUGINS]
    kubelet = json.loads(node.kubelet_config(layout))
    assert kubelet["containerRuntimeEndpoint"] == f"unix://{layout.containerd_socket}"
    assert kubelet["enforceNodeAllocatable"] == []


def test_pods_get_no_route_out():
    (bridge,) = json.loads(node.cni_config(Layout(Path("/c"))))["plugins"]
    assert bridge["ipMasq"] is False
    assert "forward" not in control_plane.corefile(Path("/k"))


def test_nested_mounts_are_dropped():
    paths = [Path("/repo/.venv"), Path("/repo"), Path("/usr/python"), Path("/repo-two")]
    assert state.outermost(paths) == [Path("/repo"), Path("/repo-two"), Path("/usr/python")]


def test_the_engine_environment_holds_this_interpreter():
    environment = state.engine_environment()
    assert environment.python == sys.executable
    assert any(Path(mount) in Path(environment.python).parents for mount in environment.mounts)
    assert any(Path(mount) in Path(environment.python).resolve().parents for mount in environment.mounts)


def test_a_kind_node_sees_the_engine_environment_read_only():
    (node_config,) = json.loads(kind.kind_config(["/repo"]))["nodes"]
    assert node_config["extraMounts"] == [{"hostPath": "/repo", "containerPath": "/repo", "readOnly": True}]


def test_system_packages_are_not_installed_unasked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packages, "missing", lambda wanted: ["runc"])
    monkeypatch.setattr(packages, "run", lambda *args, **kwargs: pytest.fail("something was installed"))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("INSTALL", raising=False)
    with pytest.raises(
        MissingPackagesError, match="apt-get install -y --no-install-recommends runc"
    ) as caught:
        packages.require(["runc", "buildah"])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("environment", "allowed"),
    [
        ({}, False),
        ({"CI": "true"}, True),
        ({"CI": "false"}, False),
        ({"INSTALL": "1"}, True),
        ({"INSTALL": "0"}, False),
    ],
)
def test_who_may_install(environment: dict[str, str], allowed: bool):
    assert packages.may_install(environment) is allowed


@pytest.fixture
def processes(tmp_path: Path):
    owned = process.Processes(tmp_path / "records", tmp_path / "logs")
    yield owned
    owned.stop_many(owned.names())


def test_a_process_is_stopped_and_started_again(processes: process.Processes):
    first = processes.start("sleeper", ["sleep", "60"])
    assert processes.running("sleeper")
    processes.stop("sleeper")
    assert not processes.running("sleeper")
    second = processes.restart("sleeper")
    assert second.argv == first.argv
    assert processes.running("sleeper")


def test_a_process_that_ignores_sigterm_is_killed(processes: process.Processes):
    processes.start("stubborn", ["sh", "-c", "trap '' TERM; echo up; sleep 60"])
    processes.wait(
        "it ignores SIGTERM", lambda: "up" in processes.log("stubborn").read_text(), 10, "stubborn"
    )
    processes.stop("stubborn", grace_s=0.2)
    assert not processes.running("stubborn")


def test_a_reused_process_id_is_not_ours(processes: process.Processes, tmp_path: Path):
    record = processes.start("sleeper", ["sleep", "60"])
    file = tmp_path / "records" / "sleeper.json"
    file.write_text(file.read_text().replace(f'"born": {record.born}', f'"born": {record.born + 1}'))
    assert not processes.running("sleeper")
    processes.stop("sleeper")
    assert process.born(record.pid) == record.born
    process.end(record.pid, signal.SIGKILL)


def test_waiting_ends_with_the_log(processes: process.Processes):
    processes.start("talker", ["sh", "-c", "echo reason; sleep 60"])
    processes.wait("it spoke", lambda: "reason" in processes.log("talker").read_text(), 10, "talker")
    with pytest.raises(
        ClusterError, match=r"it is ready: not after 0 s; last lines of .*talker.log:\n  reason"
    ):
        processes.wait("it is ready", lambda: False, 0.1, "talker")


def test_waiting_for_a_dead_process_ends_at_once(processes: process.Processes):
    processes.start("failing", ["sh", "-c", "echo cannot bind; exit 1"])
    with pytest.raises(ClusterError, match=r"failing ended before it is ready; (?s:.*)cannot bind"):
        processes.wait("it is ready", lambda: False, 30, "failing")


def test_an_unknown_process_is_named(processes: process.Processes):
    with pytest.raises(ClusterError, match="'promehteus' is unknown, allowed: none"):
        processes.restart("promehteus")


def test_an_archive_is_an_image(tmp_path: Path):
    rootfs = tmp_path / "rootfs.tar"
    with tarfile.open(rootfs, "w") as tar:
        tar.add(__file__, arcname="test")
    write_archive(tmp_path / "out.tar", rootfs, "localhost/x:1", entrypoint=("/x",))
    with tarfile.open(tmp_path / "out.tar") as tar:
        (entry,) = json.load(tar.extractfile("manifest.json"))
        config = json.load(tar.extractfile(entry["Config"]))
    assert entry["RepoTags"] == ["localhost/x:1"]
    assert config["config"]["Entrypoint"] == ["/x"]
    assert len(config["rootfs"]["diff_ids"]) == len(entry["Layers"]) == 1


def test_gpus_are_patched_into_capacity_and_allocatable():
    patch = json.loads(command.gpu_patch(8))
    assert [(step["path"].split("/")[2], step["value"]) for step in patch] == [
        ("capacity", "8"),
        ("allocatable", "8"),
    ]
    with pytest.raises(ClusterError, match="gpu count -1 is negative"):
        command.set_gpus(-1)
