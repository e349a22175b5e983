"""``kvpilot explain``: what was done, why, and why nothing is done now; in a cluster and in local mode."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

TIMEOUT_S = 10


class Format(StrEnum):
    """How it is told."""

    TEXT = "text"
    JSON = "json"


class NotFoundError(Exception):
    """There is no such resource, or nobody to ask: one sentence."""


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command(help="Say what was done to a resource, why, and why nothing is done now.")
    def explain(
        name: Annotated[str, typer.Argument(help="The KVCacheDeployment.")],
        namespace: Annotated[
            str, typer.Option("--namespace", "-n", help="Ask the cluster, in this namespace.")
        ] = "",
        run: Annotated[
            Path | None, typer.Option(help="Directory of local runs (or of this one); asks no cluster.")
        ] = None,
        last: Annotated[int, typer.Option(min=0, help="How many actions.")] = 5,
        output: Annotated[Format, typer.Option("--output", "-o", help="Form of the answer.")] = Format.TEXT,
    ) -> None:
        from pydantic import ValidationError

        from kvpilot_engine.contract import config_errors
        from kvpilot_operator.explain import explain as explained

        try:
            manifest, records, ended = _find(name, namespace, run)
        except NotFoundError as error:
            _fail(str(error))
        try:
            explanation = explained(manifest, records, last, time.time(), ended=ended)
        except ValidationError as error:
            _fail(f"the status of {name} cannot be read: {'; '.join(config_errors(error))}")
        if output is Format.JSON:
            typer.echo(json.dumps(explanation.as_json(), indent=2))
        else:
            typer.echo("\n".join(explanation.lines()))


def _fail(message: str) -> NoReturn:
    typer.echo(f"kvpilot explain: {message}", err=True)
    raise typer.Exit(2)


Found = tuple[Mapping[str, Any], list[Mapping[str, Any]], bool]
"""A resource, its records, and whether the run that left them has ended."""


def _find(name: str, namespace: str, run: Path | None) -> Found:
    """A local run where there is one and no namespace was given; else the cluster's resource."""
    from kvpilot_operator.local.state import ROOT

    if run is not None:
        if namespace:
            raise NotFoundError(f"--namespace: cannot go with --run, got {namespace}")
        return local_run(name, run)
    if not namespace and (ROOT / name / "resource.json").is_file():
        return local_run(name, ROOT)
    try:
        return *in_cluster(name, namespace), False
    except NotFoundError as error:
        there = "" if namespace else f"; local runs in {ROOT}: {_listed(_runs(ROOT))}"
        raise NotFoundError(f"{error}{there}") from None


def local_run(name: str, root: Path) -> Found:
    """What local mode left in ``root/NAME`` (or in ``root`` itself), and whether it has ended.

    Raises:
        NotFoundError: naming the runs there are.
    """
    from kvpilot_operator.local.state import is_up

    directory = root if (root / "resource.json").is_file() else root / name
    try:
        manifest = json.loads((directory / "resource.json").read_text(encoding="utf-8"))
        found = manifest["metadata"]["name"]
    except OSError:
        raise NotFoundError(f"no run of {name} in {root}; there are: {_listed(_runs(root))}") from None
    except (ValueError, KeyError, TypeError):
        raise NotFoundError(f"{directory / 'resource.json'}: not a resource") from None
    if found != name:
        raise NotFoundError(f"{directory} is a run of {found}, not of {name}")
    decisions = directory / "decisions.jsonl"
    text = decisions.read_text(encoding="utf-8") if decisions.is_file() else ""
    return manifest, parse_records(text), not is_up(directory)


def parse_records(text: str) -> list[Mapping[str, Any]]:
    """Records of a JSON-lines text; a line that is being written just now, or was cut, is left out."""
    records: list[Mapping[str, Any]] = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"id", "at", "outcome"} <= record.keys():
            records.append(record)
    return records


def in_cluster(name: str, namespace: str) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """Resource and records that the API server of the present context has.

    Raises:
        NotFoundError: naming the resources there are, or why nobody answered.
    """
    from kubernetes import client, config
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    from kvpilot_operator.manifests import names
    from kvpilot_operator.spec.models import GROUP, VERSION

    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config()
        else:
            config.load_kube_config()
    except (config.ConfigException, OSError) as error:
        raise NotFoundError(f"no resource {name}: no cluster to ask ({error})") from None
    where = namespace or _context_namespace(config)
    kind = {"group": GROUP, "version": VERSION, "namespace": where, "plural": "kvcachedeployments"}
    try:
        listed = client.CustomObjectsApi().list_namespaced_custom_object(**kind, _request_timeout=TIMEOUT_S)
        found = {item["metadata"]["name"]: item for item in listed["items"]}
        if name not in found:
            raise NotFoundError(f"no resource {name} in namespace {where}; there are: {_listed(list(found))}")
        kept = client.CoreV1Api().list_namespaced_config_map(
            where,
            field_selector=f"metadata.name={names.decisions_name(name)}",
            _request_timeout=TIMEOUT_S,
        )
    except ApiException as error:
        raise NotFoundError(f"namespace {where}: {error.status} {error.reason}") from None
    except HTTPError as error:
        raise NotFoundError(f"the cluster does not answer: {error}") from None
    text = "".join((item.data or {}).get(names.DECISIONS_KEY, "") for item in kept.items)
    return found[name], parse_records(text)


def _context_namespace(config: Any) -> str:
    try:
        _, active = config.list_kube_config_contexts()
    except config.ConfigException:
        return "default"
    return str(active["context"].get("namespace") or "default")


def _runs(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob("*/resource.json"))


def _listed(found: list[str]) -> str:
    return ", ".join(sorted(found)) or "none"
