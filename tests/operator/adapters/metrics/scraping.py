"""Small exporters and a real Prometheus that scrapes them."""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.ports import free_port
from tests.prometheus import Prometheus

from kvpilot_engine.contract import metrics as names
from kvpilot_operator.adapters.metrics.series import COUNTERS, GAUGES, OPTIONAL_COUNTERS
from kvpilot_operator.status.snapshot import Key

SCRAPE_S = 0.2


def binary() -> Path:
    """Prometheus as `make cluster-up` built it, or as the machine has it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvpilot"
    built = sorted(cache.glob("go/prometheus-*/prometheus"))
    found = built[0] if built else shutil.which("prometheus")
    if found is None:
        reason = "no Prometheus: `make programs` builds one"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return Path(found)


class Exporter:
    """One engine's /metrics: every series of the contract, with values that a test sets."""

    def __init__(self, pod: str, key: Key) -> None:
        self.labels = {
            "namespace": key.namespace, "kvpilot_name": key.name, "pod": pod, "pod_uid": f"uid-{pod}",
            "component": "engine",
        }  # fmt: skip
        self.uid = f"uid-{pod}"
        self.values: dict[str, float] = {}
        self.scraped_at = math.inf
        """When it was first read, s on the monotonic clock."""
        self.lock = threading.Lock()
        """A page is made of the values before or after a change, never during one."""
        self.reset()
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                exporter.scraped_at = min(exporter.scraped_at, time.monotonic())
                with exporter.lock:
                    body = "".join(
                        f"{series} {value}\n" for series, value in exporter.values.items()
                    ).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def reset(self) -> None:
        """As after a restart: everything zero."""
        values = {
            name: 0.0
            for name in (*COUNTERS, *OPTIONAL_COUNTERS, *GAUGES)
            if not name.endswith(("_bucket", "_requests_total")) and "_step_bucket_" not in name
        }
        for histogram in (names.REQUEST_SECONDS, names.FIRST_TOKEN_SECONDS):
            for edge in names.EDGES_S:
                values[f'{histogram}_bucket{{le="{edge:g}"}}'] = 0.0
        for outcome in names.Outcome:
            values[f'{names.REQUESTS_TOTAL}{{outcome="{outcome}"}}'] = 0.0
        values[names.CONFIG_GENERATION] = 7.0
        with self.lock:
            self.values = values

    def finished(self, requests: int, tokens: Mapping[str, float] | None = None) -> None:
        """So many requests arrived and finished within 0.3 s; ``tokens`` of each by their series."""
        with self.lock:
            self.values[names.ARRIVALS_TOTAL] += requests
            self.values[f'{names.REQUESTS_TOTAL}{{outcome="ok"}}'] += requests
            for edge in names.EDGES_S:
                if edge >= 0.3:
                    self.values[f'{names.REQUEST_SECONDS}_bucket{{le="{edge:g}"}}'] += requests
            for name, number in (tokens or {}).items():
                self.values[name] = self.values.get(name, 0.0) + number * requests

    def stop(self) -> None:
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()


@dataclass
class Scraping:
    """A running Prometheus and the exporters that it scrapes, by pod."""

    server: Prometheus
    exporters: dict[str, Exporter]

    @classmethod
    def below(cls, folder: Path, exporters: dict[str, Exporter]) -> Scraping:
        return cls(Prometheus(binary(), folder / "prometheus.yaml", folder, free_port()), exporters)

    @property
    def url(self) -> str:
        return self.server.url

    def start(self, scrape_s: float = SCRAPE_S, origins: Sequence[Mapping[str, str]] = ({},)) -> None:
        """Scrape every exporter once from each origin, which adds its labels."""
        interval = f"{int(scrape_s * 1000)}ms"
        config = {
            "global": {"scrape_interval": interval, "scrape_timeout": interval},
            "scrape_configs": [
                {
                    "job_name": f"kvpilot-{index}",
                    "static_configs": [
                        {
                            "targets": [f"127.0.0.1:{item.server.server_port}"],
                            "labels": {**item.labels, **origin},
                        }
                        for item in self.exporters.values()
                    ],
                }
                for index, origin in enumerate(origins)
            ],
        }
        self.server.config.write_text(yaml.safe_dump(config))
        self.server.start()

    def stop(self) -> None:
        for exporter in self.exporters.values():
            exporter.stop()
        self.server.stop()
