"""The API server over ``kubernetes.aio``: plain JSON in, plain JSON out, a time-out on every call.

The generated models are not used: they refuse fields that a newer server adds.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from kubernetes.aio import client, config
from kubernetes.aio.config.kube_config import KubeConfigMerger

APPLY = "application/apply-patch+yaml"
JSON = "application/json"
JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"
METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"

JsonObject = dict[str, Any]

PLURALS: Mapping[str, str] = {
    "ConfigMap": "configmaps",
    "Deployment": "deployments",
    "Event": "events",
    "HorizontalPodAutoscaler": "horizontalpodautoscalers",
    "KVCacheDeployment": "kvcachedeployments",
    "KVCacheOverride": "kvcacheoverrides",
    "Pod": "pods",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "Secret": "secrets",
    "Service": "services",
    "ServiceAccount": "serviceaccounts",
}
"""Every kind that the operator touches."""


_NOT_CONVERTED = re.compile("failed to (create typed patch object|convert)")


def kubeconfig() -> str:
    """Path of the user's kubeconfig, or paths as ``$KUBECONFIG`` lists them.

    Raises:
        kubernetes.aio.config.ConfigException: there is no such file.
    """
    paths = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube/config")
    if not any(Path(path).expanduser().is_file() for path in paths.split(os.pathsep)):
        raise config.ConfigException(f"no kubeconfig {paths}")
    return paths


@contextmanager
def _reading(paths: str) -> Iterator[None]:
    """What the client raises for a file that is no kubeconfig, as one error.

    Raises:
        kubernetes.aio.config.ConfigException: it is none.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise config.ConfigException(f"{paths} is no kubeconfig") from error


def contexts() -> tuple[dict[str, JsonObject], str]:
    """The contexts of the user's kubeconfig by name, and the name of the current one, "" for none.

    Raises:
        kubernetes.aio.config.ConfigException: there is no kubeconfig, or none that can be read.
    """
    paths = kubeconfig()
    with _reading(paths):
        found = KubeConfigMerger(paths).config.value
        entries = [item.value for item in found["contexts"]]
        known = {str(item["name"]): dict(item["context"]) for item in entries}
        return known, str(found.get("current-context") or "")


class ApiError(Exception):
    """The API server refused or could not be reached: one sentence. ``status`` is 0 without an answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    @property
    def refuses_object(self) -> bool:
        """True if the object is invalid, so that a retry is of no use.

        A field that the API server cannot convert is a 500, too; other 500s are faults of the server.
        """
        return self.status in {400, 422} or (
            self.status == HTTPStatus.INTERNAL_SERVER_ERROR and _NOT_CONVERTED.search(str(self)) is not None
        )

    @property
    def denies_object(self) -> bool:
        """True if the object is invalid, or a policy, a quota or missing rights refuse it."""
        return self.refuses_object or self.status == HTTPStatus.FORBIDDEN


def path_of(api_version: str, kind: str, namespace: str = "", name: str = "", subresource: str = "") -> str:
    """The URL path of a collection or an object; all namespaces without ``namespace``."""
    root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    parts = [root, f"namespaces/{namespace}" if namespace else "", PLURALS[kind], name, subresource]
    return "/".join(part for part in parts if part)


class KubernetesApi:
    """A connection. ``connect`` makes one; close it at the end.

    Args:
        timeout_s: longest wait for one answer.
    """

    def __init__(self, api_client: client.ApiClient, timeout_s: float = 15.0) -> None:
        self._client = api_client
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, connect=min(timeout_s, 10.0))

    @classmethod
    async def connect(cls, kubeconfig: Path | None, timeout_s: float = 15.0) -> KubernetesApi:
        """Connect by a kubeconfig, or by the service account of this pod.

        Raises:
            kubernetes.aio.config.ConfigException: neither exists.
        """
        settings = client.Configuration()
        if kubeconfig is None:
            config.load_incluster_config(client_configuration=settings)
        else:
            await config.load_kube_config(config_file=str(kubeconfig), client_configuration=settings)
        settings.connection_pool_maxsize = 32
        return cls(client.ApiClient(settings), timeout_s)

    @classmethod
    async def connect_as_user(cls, timeout_s: float = 15.0, context: str = "") -> KubernetesApi:
        """Connect as kubectl does: by ``$KUBECONFIG`` or ~/.kube/config; in a pod by its service account.

        Args:
            context: of the kubeconfig, which then serves in a pod as well; "" for the current one.

        Raises:
            kubernetes.aio.config.ConfigException: there is no configuration.
        """
        if "KUBERNETES_SERVICE_HOST" in os.environ and not context:
            return await cls.connect(None, timeout_s)
        settings = client.Configuration()
        paths = kubeconfig()
        with _reading(paths):
            await config.load_kube_config(
                config_file=paths, context=context or None, client_configuration=settings
            )
        return cls(client.ApiClient(settings), timeout_s)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        content_type: str = JSON,
        accept: str = JSON,
        **query: str,
    ) -> JsonObject:
        """One call.

        Raises:
            ApiError: the server refused, did not answer in time, or cannot be reached.
        """
        sent = {"Accept": accept, "Content-Type": content_type}
        answer: JsonObject = json.loads(await self._answer(method, path, body, sent, query))
        return answer

    async def text(self, path: str) -> str:
        """What a path answers, as text: the page of a pod behind the proxy of the API server.

        Raises:
            ApiError: see ``request``.
        """
        return (await self._answer("GET", path, None, {"Accept": "text/plain"}, {})).decode(errors="replace")

    async def _answer(
        self, method: str, path: str, body: Any, headers: dict[str, str], query: Mapping[str, str]
    ) -> bytes:
        serialized = await self._client.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        verb, url, sent, payload, _ = serialized
        try:
            response = await self._client.call_api(
                verb, url, sent, body=payload, _request_timeout=self._timeout
            )
            text = await response.read()
        except TimeoutError as error:
            raise ApiError(f"{method} {path}: no answer within {self._timeout.total:g} s", 0) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ApiError(f"{method} {path}: {error}", 0) from error
        if response.status >= 400:
            raise ApiError(f"{method} {path}: {response.status} {_reason(text)}", response.status)
        return bytes(text)

    async def get(self, path: str) -> JsonObject | None:
        """An object; None if it does not exist."""
        try:
            return await self.request("GET", path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def metadata(self, kind: str, namespace: str, name: str) -> JsonObject | None:
        """Metadata of an object of ``v1`` that this operator may write and not read.

        None if it does not exist. It is the answer to a dry-run apply of an empty object.
        """
        try:
            found = await self.request(
                "PATCH",
                path_of("v1", kind, namespace, name),
                {"apiVersion": "v1", "kind": kind, "metadata": {"namespace": namespace, "name": name}},
                content_type=APPLY,
                accept=METADATA_ONLY,
                fieldManager="kvpilot-probe",
                dryRun="All",
            )
        except ApiError as error:
            if error.status == 404:  # the namespace
                return None
            raise
        # An object that the dry run would create has no version.
        return found if found["metadata"].get("resourceVersion") else None

    async def list(self, path: str, **query: str) -> list[JsonObject]:
        """The items of a collection."""
        answer = await self.request("GET", path, **query)
        return list(answer.get("items") or ())

    async def apply(self, item: Mapping[str, Any], manager: str, subresource: str = "") -> JsonObject:
        """Server-side apply with force: exactly the given fields become the manager's."""
        metadata = item["metadata"]
        return await self.request(
            "PATCH",
            path_of(item["apiVersion"], item["kind"], metadata["namespace"], metadata["name"], subresource),
            dict(item),
            content_type=APPLY,
            fieldManager=manager,
            force="true",
        )


def _reason(text: bytes) -> str:
    try:
        return str(json.loads(text)["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return text[:200].decode(errors="replace")
