"""Render the chart to one file for `kubectl apply`: `python -m scripts.manifests [--set K=V ...]`.

The first run generates the keys of the Secret; later runs reuse those in the existing file. To publish the
file, set `secret.existingSecret` instead.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[1]
CHART = REPO / "charts" / "kvpilot"
OUTPUT = REPO / "dist" / "install.yaml"
RELEASE = "kvpilot"
KEYS = {"operator-key": "secret.operatorKey", "alerts-token": "secret.alertsToken"}


class ManifestsError(Exception):
    """Helm could not render the chart; the message is Helm's."""


def find_helm(repo: Path = REPO) -> str | None:
    """Path of Helm: of the test cluster, from PATH, or from the cache that `make cluster-up` fills."""
    state = repo / ".cluster" / "cluster.json"
    if state.is_file():
        helm = json.loads(state.read_text()).get("helm", "")
        if helm and Path(helm).is_file():
            return str(helm)
    if found := shutil.which("helm"):
        return found
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvpilot" / "go"
    built = sorted(cache.glob("helm-*/helm"), key=lambda path: path.stat().st_mtime)
    return str(built[-1]) if built else None


def render(helm: str, namespace: str, arguments: Sequence[str]) -> str:
    """Output of `helm template` without the test hook, preceded by a Namespace.

    Raises:
        ManifestsError: Helm failed; the message is its error output.
    """
    command = [helm, "template", RELEASE, str(CHART), "--namespace", namespace, "--no-hooks", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise ManifestsError(done.stderr.strip())
    head = yaml.safe_dump({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    note = "# Rendered by `make manifests` from charts/kvpilot. Contains keys: do not publish it.\n"
    return note + head + done.stdout


def kept_keys(previous: Path) -> list[str]:
    """Arguments for Helm that set the keys of an earlier output file; empty if there is none."""
    if not previous.is_file():
        return []
    documents: list[Any] = list(yaml.safe_load_all(previous.read_text(encoding="utf-8")))
    secrets = [item["data"] for item in documents if item and item["kind"] == "Secret"]
    return [
        argument
        for data in secrets
        for key, value in KEYS.items()
        if key in data
        for argument in ("--set-string", f"{value}={base64.b64decode(data[key]).decode()}")
    ]


def main(arguments: Sequence[str]) -> int:
    """Write the file; exit code 0, or 2 if Helm is missing or fails."""
    parser = argparse.ArgumentParser(prog="python -m scripts.manifests", description=__doc__)
    parser.add_argument("--namespace", default="kvpilot-system", help="namespace of the operator")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file to write")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="a value of the chart")
    parser.add_argument("--values", action="append", default=[], metavar="FILE", help="a file of values")
    given = parser.parse_args(arguments)
    helm = find_helm()
    if helm is None:
        print(
            "no helm: install it (https://helm.sh, or `go install helm.sh/helm/v4/cmd/helm@v4.3.1`), "
            "or run `make cluster-up`, which builds it",
            file=sys.stderr,
        )
        return 2
    chosen = [part for value in given.set for part in ("--set", value)]
    chosen += [part for file in given.values for part in ("--values", file)]
    try:
        text = render(helm, given.namespace, [*kept_keys(given.output), *chosen])
    except ManifestsError as error:
        print(f"helm: {error}", file=sys.stderr)
        return 2
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(text, encoding="utf-8")
    given.output.chmod(0o600)
    print(f"wrote {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
