"""Builds the container images of the Dockerfile: `python -m scripts.images [operator|engine|all]`.

Builds with Docker if a daemon answers, else with buildah (as root). The tag of an image is a hash of its
inputs and its archive stays in the cache, so an unchanged image is not built again.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from scripts.cluster.base_image import Image, base_image
from scripts.cluster.console import ClusterError, say
from scripts.cluster.layout import REPO, cache_dir
from scripts.cluster.packages import BUILD_PACKAGES, require
from scripts.cluster.process import run

TARGETS = ("operator", "engine")
SOURCES = ("engine", "operator")
INPUTS = ("Dockerfile", ".dockerignore", "pyproject.toml", "uv.lock", "README.md", "LICENSE", *SOURCES)
DOCKER_BASE = "docker.io/library/python:3.11-slim-bookworm"
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
KEPT_ARCHIVES = 2


def input_files(root: Path) -> Iterable[Path]:
    """The files that the Dockerfile copies, in a stable order."""
    for name in INPUTS:
        top = root / name
        found = sorted(top.rglob("*")) if top.is_dir() else [top]
        yield from (f for f in found if f.is_file() and "__pycache__" not in f.parts and f.suffix != ".pyc")


def content_key(root: Path, target: str, base: str) -> str:
    """Hash of all inputs of an image."""
    digest = hashlib.sha256(f"{target}\0{base}\0".encode())
    for file in input_files(root):
        digest.update(f"{file.relative_to(root)}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def docker_runs() -> bool:
    """True if a Docker daemon answers."""
    if shutil.which("docker") is None:
        return False
    done = subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=60)
    return done.returncode == 0


def build(target: str, cache: Path, root: Path = REPO) -> Image:
    """Build one target of the Dockerfile unless its archive is in the cache."""
    with_docker = docker_runs()
    base = None if with_docker else base_image(cache / "images")
    key = content_key(root, target, base.reference if base else DOCKER_BASE)
    image = Image(f"localhost/kvpilot/{target}:{key}", cache / "images" / f"{target}-{key}.tar")
    if image.archive.exists():
        image.archive.touch()
        return image
    say(f"building the {target} image with {'buildah' if base else 'docker'}")
    begun = time.monotonic()
    partial = image.archive.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    if base:
        _build_with_buildah(target, image.reference, base, partial, root)
    else:
        command = [
            "docker",
            "build",
            "--target",
            target,
            "--build-arg",
            f"BASE={DOCKER_BASE}",
            "-t",
            image.reference,
        ]
        _run_logged([*command, str(root)], partial.parent / f"{target}-build.log")
        run(["docker", "save", "-o", partial, image.reference], timeout_s=900)
    partial.rename(image.archive)
    _drop_older(image.archive, target)
    size = image.archive.stat().st_size >> 20
    say(f"  {target} image: built in {time.monotonic() - begun:.0f} s, {size} MiB")
    return image


def buildah(cache: Path) -> list[str]:
    """Buildah with its storage in the cache; the private mount namespace removes the mount that it leaves."""
    storage = cache / "buildah"
    return [
        *("unshare", "--mount", "--propagation", "private", "nice", "-n", "10"),
        *("buildah", "--storage-driver", "overlay"),
        *("--root", str(storage / "root"), "--runroot", str(storage / "run")),
    ]


def _build_with_buildah(target: str, reference: str, base: Image, out: Path, root: Path) -> None:
    tool = buildah(out.parent.parent)
    known = run([*tool, "images", "--format", "{{.Name}}:{{.Tag}}"], timeout_s=120).split()
    if base.reference not in known:
        run([*tool, "pull", "--quiet", f"docker-archive:{base.archive}"], timeout_s=300)
    # Use the machine's certificates: it may be behind a proxy whose certificate the image does not have.
    certificates = ["--volume", f"{CA_BUNDLE}:{CA_BUNDLE}:ro"] if CA_BUNDLE.exists() else []
    options = ["--isolation", "chroot", "--pull-never", "--layers", "--target", target, "--tag", reference]
    command = [*tool, "bud", *options, "--build-arg", f"BASE={base.reference}", *certificates, str(root)]
    _run_logged(command, out.parent / f"{target}-build.log")
    run([*tool, "push", "--quiet", reference, f"docker-archive:{out}:{reference}"], timeout_s=900)


def _run_logged(command: list[str], log: Path) -> None:
    with log.open("wb") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False, timeout=3600)
    if done.returncode:
        tail = log.read_text(errors="replace").splitlines()[-25:]
        raise ClusterError(f"the image build failed; last lines of {log}:\n" + "\n".join(tail))


def _drop_older(newest: Path, target: str) -> None:
    archives = sorted(newest.parent.glob(f"{target}-*.tar"), key=lambda p: p.stat().st_mtime)
    for old in archives[:-KEPT_ARCHIVES]:
        old.unlink()


def main(arguments: list[str] | None = None) -> int:
    """Command line; prints `target reference archive` for each image."""
    parser = argparse.ArgumentParser(prog="scripts.images", description=__doc__)
    parser.add_argument("target", nargs="?", default="all", choices=[*TARGETS, "all"])
    chosen = parser.parse_args(arguments).target
    try:
        if not docker_runs():
            require(BUILD_PACKAGES)
        for target in TARGETS if chosen == "all" else (chosen,):
            image = build(target, cache_dir())
            print(target, image.reference, image.archive)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
