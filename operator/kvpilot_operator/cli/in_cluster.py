"""Resources of a cluster as the commands see them, by the kubeconfig or a service account."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from kubernetes.aio.config import ConfigException

from kvpilot_operator.adapters.kubernetes.api import ApiError, JsonObject, KubernetesApi, contexts, path_of
from kvpilot_operator.cli.target import CommandError, Json, NotFoundError, listed
from kvpilot_operator.manifests import names
from kvpilot_operator.resource.model import API_VERSION
from kvpilot_operator.status.history import parse_records
from kvpilot_operator.status.snapshot import Key

T = TypeVar("T")

TIMEOUT_S = 10.0
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
REVIEW = "/apis/authentication.k8s.io/v1/selfsubjectreviews"


def _call(context: str, work: Callable[[KubernetesApi], Awaitable[T]]) -> T:
    """Connect by a context of the kubeconfig, "" for the current one, work, disconnect.

    Raises:
        CommandError: there is no cluster to ask, it does not answer, or it refuses.
    """

    async def connected() -> T:
        api = await KubernetesApi.connect_as_user(TIMEOUT_S, context)
        try:
            return await work(api)
        finally:
            await api.close()

    try:
        return asyncio.run(connected())
    except (ConfigException, OSError) as error:
        raise NotFoundError(f"no cluster to ask ({' '.join(str(error).split())})") from None
    except ApiError as error:
        raise CommandError(str(error)) from None


class ClusterResource:
    """A KVCacheDeployment of the API server; see ``Target``."""

    ended = False

    def __init__(self, manifest: Json, context: str = "") -> None:
        metadata = manifest["metadata"]
        self.key = Key(str(metadata["namespace"]), str(metadata["name"]))
        self.manifest = manifest
        self.options = f" -n {self.key.namespace}" + (f" --context {shlex.quote(context)}" if context else "")
        self._context = context

    def records(self) -> list[Json]:
        """Whole decision records, oldest first."""
        path = path_of("v1", "ConfigMap", self.key.namespace, names.decisions_name(self.key.name))
        kept = _call(self._context, lambda api: api.get(path)) or {}
        return parse_records(str((kept.get("data") or {}).get(names.DECISIONS_KEY, "")))

    def overrides(self) -> list[Json]:
        """All overrides of the namespace."""
        path = path_of(API_VERSION, "KVCacheOverride", self.key.namespace)
        return [*_call(self._context, lambda api: api.list(path))]

    def create(self, override: Json) -> str:
        """Create an override; returns its name.

        Raises:
            CommandError: the API server refuses it.
        """
        path = path_of(API_VERSION, "KVCacheOverride", self.key.namespace)
        made = _call(
            self._context, lambda api: api.request("POST", path, dict(override), fieldManager="kvpilot-cli")
        )
        return str(made["metadata"]["name"])

    def delete(self, override: str) -> None:
        """Delete an override.

        Raises:
            CommandError: the API server refuses it.
        """
        path = path_of(API_VERSION, "KVCacheOverride", self.key.namespace, override)

        async def gone(api: KubernetesApi) -> None:
            try:
                await api.request("DELETE", path)
            except ApiError as error:
                if error.status != 404:
                    raise

        _call(self._context, gone)

    def pages(self) -> dict[str, str | None]:
        """Text of the metrics page of each ready pod, through the API server, by the pod's name.

        None for one that does not answer.

        Raises:
            CommandError: the API server refuses the proxy to every pod.
        """
        return _call(self._context, self._pages)

    async def _pages(self, api: KubernetesApi) -> dict[str, str | None]:
        namespace, name = self.key
        selector = ",".join(f"{label}={value}" for label, value in names.selector_labels(name).items())
        pods = await api.list(path_of("v1", "Pod", namespace), labelSelector=selector)
        found = sorted(str(pod["metadata"]["name"]) for pod in pods if _is_ready(pod))
        paths = [
            path_of("v1", "Pod", namespace, f"{pod}:{names.HTTP_PORT}", "proxy/metrics") for pod in found
        ]
        texts = await asyncio.gather(*(api.text(path) for path in paths), return_exceptions=True)
        for refusal in (text for text in texts if isinstance(text, ApiError)):
            if refusal.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
                raise refusal
        return {pod: text if isinstance(text, str) else None for pod, text in zip(found, texts, strict=True)}

    def user(self) -> str:
        """The user as the API server knows it; else the one of the kubeconfig."""
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        with contextlib.suppress(CommandError):
            found = _call(self._context, lambda api: api.request("POST", REVIEW, review))
            return str(found["status"]["userInfo"]["username"])
        return str(_entry(self._context).get("user", ""))


def _is_ready(pod: JsonObject) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)


def find_in_cluster(name: str, namespace: str, context: str = "") -> ClusterResource:
    """The resource of that name.

    Raises:
        NotFoundError: there is none, or the API server cannot be asked.
        CommandError: there is no such context.
    """
    _check(context)
    where = namespace or _namespace(context)
    try:
        found = {item.key.name: item for item in _all(where, context)}
    except NotFoundError as error:
        raise NotFoundError(f"no resource {name}: {error}") from None
    except CommandError as error:
        raise NotFoundError(f"namespace {where}: {error}") from None
    if name not in found:
        raise NotFoundError(f"no resource {name} in namespace {where}; there are: {listed([*found])}")
    return found[name]


def all_in_cluster(namespace: str, context: str = "", *, everywhere: bool = False) -> list[ClusterResource]:
    """The resources of a namespace, or of all.

    Raises:
        CommandError: the API server cannot be asked, or there is no such context.
    """
    _check(context)
    return _all("" if everywhere else namespace or _namespace(context), context)


def context_names() -> list[str]:
    """Contexts of the kubeconfig; none if there is no kubeconfig."""
    try:
        return sorted(contexts()[0])
    except (ConfigException, OSError):
        return []


def _check(context: str) -> None:
    """Refuse a context that there is not.

    Raises:
        CommandError: names those that there are.
    """
    if not context:
        return
    try:
        known, _ = contexts()
    except (ConfigException, OSError) as error:
        raise CommandError(f"--context: {error}") from None
    if context not in known:
        raise CommandError(f"--context: must be one of {listed([*known])}, got {context}")


def _all(namespace: str, context: str) -> list[ClusterResource]:
    path = path_of(API_VERSION, "KVCacheDeployment", namespace)
    items = _call(context, lambda api: api.list(path))
    return sorted((ClusterResource(item, context) for item in items), key=lambda item: item.key)


def _entry(context: str) -> dict[str, Any]:
    """Cluster, user and namespace of a context, "" for the current one."""
    try:
        known, current = contexts()
    except (ConfigException, OSError):
        return {}
    return known.get(context or current, {})


def _namespace(context: str) -> str:
    if "KUBERNETES_SERVICE_HOST" in os.environ and SERVICE_ACCOUNT.is_file() and not context:
        return SERVICE_ACCOUNT.read_text(encoding="utf-8").strip()
    return str(_entry(context).get("namespace") or "default")
