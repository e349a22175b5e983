"""Parts of the test cluster that need no cluster: hashes, configurations, processes, packages."""

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
from scripts.cluster.console import ClusterError, MachineNotReadyError
from scripts.cluster.layout import Layout


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    (tmp_path / "etcd").mkdir()
    (tmp_path / "etcd" / "go.mod").write_text("module x\n")
    (tmp_path / "etcd" / "go.sum").write_text("a v1 h1:x\n")
    return tmp_path


def test_recipes_are_pinned_and_have_distinct_keys_and_programs():
    recipes = {*build.EVERYTHING, *build.WITH_DOCKER}
    assert len({recipe.key() for recipe in recipes}) == len(recipes)
    for recipe in recipes:
        assert (build.PINS / recipe.name / "go.sum").exists()
    names = [name for recipe in build.EVERYTHING for name in recipe.programs]
    assert {"etcd", "kube-apiserver", "kubelet", "coredns", "helm", "promtool", "amtool"} <= set(names)
    assert len(names) == len(set(names))


def test_changed_pin_or_flag_changes_the_key(pins: Path):
    key = build.ETCD.key(pins)
    assert replace(build.ETCD, tags="other").key(pins) != key
    assert build.ETCD.key(pins) == key
    (pins / "etcd" / "go.sum").write_text("a v2 h1:y\n")
    assert build.ETCD.key(pins) != key


def test_build_command_is_reproducible():
    line = " ".join(build.build_command(build.KUBERNETES, Path("go"), Path("/out")))
    assert "-mod=readonly -buildvcs=false" in line
    assert "component-base/version.gitVersion=v1.37.1" in line
    assert line.endswith("k8s.io/kubernetes/cmd/kubectl")


def test_cached_build_needs_no_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "find_go", lambda cache: pytest.fail("Go must not be searched"))
    (tmp_path / "go" / f"etcd-{build.ETCD.key()}").mkdir(parents=True)
    programs = build.build_all(tmp_path, [build.ETCD])
    assert programs == {"etcd": tmp_path / "go" / f"etcd-{build.ETCD.key()}" / "etcd"}


def test_prometheus_selects_engine_and_operator_pods_by_port_name():
    config = json.loads(monitoring.prometheus_config(Path("/k"), Path("/rules")))
    (job,) = config["scrape_configs"]
    (discovery,) = job["kubernetes_sd_configs"]
    assert discovery["kubeconfig_file"] == "/k"
    assert discovery["selectors"] == [{"role": "pod", "label": "app.kubernetes.io/part-of=kvpilot"}]
    targets = {rule["target_label"] for rule in job["relabel_configs"] if "target_label" in rule}
    assert targets == {"namespace", "pod", "pod_uid", "kvpilot_name", "component"}
    assert config["rule_files"] == ["/rules/*.yaml"]
    assert config["global"]["scrape_interval"] == config["global"]["evaluation_interval"] == "1s"


def test_paths_of_the_node_are_below_the_cache(tmp_path: Path):
    layout = Layout(tmp_path)
    toml = node.containerd_config(layout, "pause:1")
    paths = [line.split('"')[1] for line in toml.splitlines() if ' = "/' in line]
    assert [path for path in paths if not path.startswith(str(tmp_path))] == [node.CNI_PLUGINS]
    kubelet = json.loads(node.kubelet_config(layout))
    assert kubelet["containerRuntimeEndpoint"] == f"unix://{layout.containerd_socket}"
    assert kubelet["enforceNodeAllocatable"] == []


def test_pods_have_no_default_route():
    (bridge,) = json.loads(node.cni_config(Layout(Path("/c"))))["plugins"]
    assert bridge["ipMasq"] is False
    assert "forward" not in control_plane.corefile(Path("/k"))


def test_nested_mounts_are_dropped():
    paths = [Path("/repo/.venv"), Path("/repo"), Path("/usr/python"), Path("/repo-two")]
    assert state.outermost(paths) == [Path("/repo"), Path("/repo-two"), Path("/usr/python")]


def test_engine_environment_contains_this_interpreter():
    environment = state.engine_environment()
    assert environment.python == sys.executable
    assert any(Path(mount) in Path(environment.python).parents for mount in environment.mounts)
    assert any(Path(mount) in Path(environment.python).resolve().parents for mount in environment.mounts)


def test_kind_mounts_the_engine_environment_read_only():
    (node_config,) = json.loads(kind.kind_config(["/repo"]))["nodes"]
    assert node_config["extraMounts"] == [{"hostPath": "/repo", "containerPath": "/repo", "readOnly": True}]


def test_system_packages_are_not_installed_without_a_request(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packages, "missing", lambda wanted: ["runc"])
    monkeypatch.setattr(packages, "run", lambda *args, **kwargs: pytest.fail("something was installed"))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("INSTALL", raising=False)
    with pytest.raises(
        MachineNotReadyError, match="apt-get install -y --no-install-recommends runc"
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
def test_installing_requires_ci_or_install(environment: dict[str, str], allowed: bool):
    assert packages.may_install(environment) is allowed


def test_installing_uses_root_or_sudo_and_fails_with_one_line_without_either():
    assert packages.as_root(["apt-get"], user_id=0, sudo=None) == ["apt-get"]
    assert packages.as_root(["apt-get"], user_id=1000, sudo="/usr/bin/sudo") == ["/usr/bin/sudo", "apt-get"]
    with pytest.raises(
        MachineNotReadyError, match=r"^INSTALL=1 needs root or sudo.*run it as root$"
    ) as caught:
        packages.as_root(["apt-get"], user_id=1000, sudo=None)
    assert caught.value.exit_code == 2


def test_packages_are_printed_before_installing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    installed = []

    def record(command: list[str], timeout_s: float) -> str:
        installed.append((" ".join(command), capsys.readouterr().err))
        return ""

    monkeypatch.setattr(packages, "missing", lambda wanted: ["runc", "socat"])
    monkeypatch.setattr(packages, "run", record)
    monkeypatch.setattr(packages.os, "geteuid", lambda: 0)
    monkeypatch.setenv("INSTALL", "1")
    packages.require(["runc", "socat"])
    (update, said), (install, _) = installed
    assert "installing system packages with apt-get: runc, socat" in said
    assert update.endswith("apt-get update -qq")
    assert install.endswith("apt-get install -y --no-install-recommends runc socat")


@pytest.fixture
def processes(tmp_path: Path):
    owned = process.Processes(tmp_path / "records", tmp_path / "logs")
    yield owned
    owned.stop_many(owned.names())


def test_process_stops_and_starts_again(processes: process.Processes):
    first = processes.start("sleeper", ["sleep", "60"])
    assert processes.running("sleeper")
    processes.stop("sleeper")
    assert not processes.running("sleeper")
    second = processes.restart("sleeper")
    assert second.argv == first.argv
    assert processes.running("sleeper")


def test_process_that_ignores_sigterm_is_killed(processes: process.Processes):
    processes.start("stubborn", ["sh", "-c", "trap '' TERM; echo up; sleep 60"])
    processes.wait(
        "it ignores SIGTERM", lambda: "up" in processes.log("stubborn").read_text(), 60, "stubborn"
    )
    processes.stop("stubborn", grace_s=0.2)
    assert not processes.running("stubborn")


def test_reused_process_id_does_not_count_as_running(processes: process.Processes, tmp_path: Path):
    record = processes.start("sleeper", ["sleep", "60"])
    file = tmp_path / "records" / "sleeper.json"
    file.write_text(file.read_text().replace(f'"born": {record.born}', f'"born": {record.born + 1}'))
    assert not processes.running("sleeper")
    processes.stop("sleeper")
    assert process.born(record.pid) == record.born
    process.end(record.pid, signal.SIGKILL)


def test_wait_timeout_shows_the_log(processes: process.Processes):
    processes.start("talker", ["sh", "-c", "echo reason; sleep 60"])
    processes.wait("it spoke", lambda: "reason" in processes.log("talker").read_text(), 60, "talker")
    with pytest.raises(
        ClusterError,
        match=r"timed out after 0 s while waiting until it is ready; last lines of .*talker.log:\n  reason",
    ):
        processes.wait("it is ready", lambda: False, 0.1, "talker")


def test_wait_for_a_dead_process_fails_at_once(processes: process.Processes):
    processes.start("failing", ["sh", "-c", "echo cannot bind; exit 1"])
    with pytest.raises(
        ClusterError, match=r"failing ended while waiting until it is ready; (?s:.*)cannot bind"
    ):
        processes.wait("it is ready", lambda: False, 60, "failing")


def test_unknown_process_is_named(processes: process.Processes):
    with pytest.raises(ClusterError, match="'promehteus' is unknown, allowed: none, the cluster is down"):
        processes.restart("promehteus")


def test_archive_is_a_loadable_image(tmp_path: Path):
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
