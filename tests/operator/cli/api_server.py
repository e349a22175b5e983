"""An API server in this process: as much of its HTTP as the commands use, and a kubeconfig for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]

PREFIX = "/apis/kvpilot.io/v1alpha1"


class ApiServer(ThreadingHTTPServer):
    """Objects by path, pages of pods, and what is forbidden.

    Attributes:
        forbidden: (method, plural) that the user may not use.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, Json] = {}
        self.pages: dict[str, Callable[[], str]] = {}
        self.forbidden: set[tuple[str, str]] = set()
        self.made = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, plural: str, item: Json) -> None:
        """Store an object of kvpilot.io."""
        metadata = item["metadata"]
        self.objects[f"{PREFIX}/namespaces/{metadata['namespace']}/{plural}/{metadata['name']}"] = item

    def of(self, plural: str) -> list[Json]:
        """All objects of a plural."""
        return [item for path, item in self.objects.items() if path.split("/")[-2] == plural]

    def listed(self, path: str) -> list[Json]:
        """The items of a collection, of one namespace or of all."""
        root, _, plural = path.rpartition("/")
        return [
            item
            for at, item in self.objects.items()
            if at.split("/")[-2] == plural and at.startswith(f"{root}/")
        ]


class _Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _answer(self, status: int, body: Any, kind: str = "application/json") -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuses(self, method: str) -> bool:
        found = {(method, part) for part in self.path.partition("?")[0].split("/")} & self.server.forbidden
        if found:
            [(_, plural)] = found
            message = f'{plural}.kvpilot.io is forbidden: User "ana" cannot {method.lower()} resource'
            self._answer(403, {"kind": "Status", "message": message})
        return bool(found)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self._refuses("GET"):
            return
        if path in self.server.pages:
            self._answer(200, self.server.pages[path](), "text/plain")
        elif path in self.server.objects:
            self._answer(200, self.server.objects[path])
        elif path.rsplit("/", 1)[-1] in {"kvcachedeployments", "kvcacheoverrides", "pods"}:
            self._answer(200, {"items": self.server.listed(path)})
        else:
            self._answer(404, {"message": f"{path} not found"})

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refuses("POST"):
            return
        if path.endswith("selfsubjectreviews"):
            self._answer(201, {"status": {"userInfo": {"username": "ana@example.com"}}})
            return
        self.server.made += 1
        name = f"{body['metadata']['generateName']}{self.server.made}"
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        metadata = {**body["metadata"], "name": name, "creationTimestamp": now}
        self.server.objects[f"{path}/{name}"] = made = {**body, "metadata": metadata}
        self._answer(201, made)

    def do_DELETE(self) -> None:
        if self._refuses("DELETE"):
            return
        found = self.server.objects.pop(self.path.partition("?")[0], None)
        self._answer(404 if found is None else 200, found or {"message": "not found"})


@contextmanager
def serving(kubeconfig: Path, namespace: str = "team-a") -> Iterator[ApiServer]:
    """A running API server, with a kubeconfig whose context has that namespace and the user `ana`.

    A second context, ``nowhere``, is of a cluster that does not answer.
    """
    server = ApiServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    context = {"cluster": "here", "user": "ana", "namespace": namespace}
    nowhere = {"cluster": "nowhere", "user": "ana"}
    away = {"server": "http://127.0.0.1:9"}
    kubeconfig.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "here",
                "clusters": [
                    {"name": "here", "cluster": {"server": server.url}},
                    {"name": "nowhere", "cluster": away},
                ],
                "users": [{"name": "ana", "user": {"token": "t"}}],
                "contexts": [{"name": "here", "context": context}, {"name": "nowhere", "context": nowhere}],
            }
        )
    )
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
