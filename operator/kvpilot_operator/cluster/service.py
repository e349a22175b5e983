"""The operator as a process: the loop on its queue, the watches that feed it, and its two HTTP ports."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

import structlog
from aiohttp import web
from kubernetes.aio.config import ConfigException
from yaml import YAMLError

from kvpilot_operator import handlers
from kvpilot_operator.adapters.engine_admin import EngineAdmin
from kvpilot_operator.adapters.kubernetes_api import ApiError, KubernetesApi
from kvpilot_operator.adapters.kubernetes_cluster import KubernetesCluster
from kvpilot_operator.adapters.prometheus_metrics import PrometheusMetrics
from kvpilot_operator.alerts import AlertReceiver
from kvpilot_operator.loop import Look, Loop
from kvpilot_operator.operator_metrics import OperatorMetrics
from kvpilot_operator.ports import Key
from kvpilot_operator.queue import KeyedQueue
from kvpilot_operator.sources import load_sources

log = structlog.get_logger(__name__)

BOOST_S, RESOLVED_S, SWEEP_S = 600.0, 60.0, 10.0
"""Life of an alert's boost, what is left of it when the alert is resolved, and between two sweeps of expired
overrides; scaled like every other duration."""

REFUSED_S = 30.0
"""Between two looks at a refused resource, s: what it collides with may go, or a policy change, unseen."""

DEFINITIONS_S = 1.0
"""Between two questions for definitions that are missing at the start."""

STUCK_S = 60.0
"""A queue that has not turned for this long makes /healthz fail."""


@dataclass(frozen=True)
class Options:
    """What the command was told.

    Attributes:
        kubeconfig: None inside a pod.
        alerts_token_file: None leaves /alerts closed.
        namespaces: watched ones; none for all.
    """

    sources_file: Path
    key_file: Path
    kubeconfig: Path | None = None
    alerts_token_file: Path | None = None
    namespaces: tuple[str, ...] = ()
    pace_scale: float = 1.0
    metrics_port: int = 8080
    alerts_port: int = 8081


class Operator:
    """One running operator. ``run`` returns when it was told to stop, everything in progress finished."""

    def __init__(self, options: Options, api: KubernetesApi) -> None:
        key = options.key_file.read_bytes().strip()
        if len(key) < 32:
            raise ValueError(f"{options.key_file}: at least 32 bytes are required, got {len(key)}")
        self._options = options
        self._api = api
        self._telemetry = OperatorMetrics()
        self._engines = EngineAdmin()
        self._cluster = KubernetesCluster(
            api, key, namespaces=options.namespaces, instance=socket.gethostname()
        )
        self._metrics = PrometheusMetrics(load_sources(options.sources_file), self._cluster.source_of)
        self._loop = Loop(
            self._cluster,
            self._metrics,
            self._engines,
            pace_scale=options.pace_scale,
            telemetry=self._telemetry,
        )
        self._queue = KeyedQueue(self._look, self._resync)
        self._seen: dict[Key, Look] = {}
        self._runners: list[web.AppRunner] = []

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            Exception: a part of it ended by itself.
        """
        stop = asyncio.Event()
        background = [
            asyncio.create_task(self._queue.run(), name="queue"),
            asyncio.create_task(self._sweep(), name="sweep"),
        ]
        for task in background:
            task.add_done_callback(lambda _: stop.set())
        for number in (signal.SIGTERM, signal.SIGINT):  # until Kopf puts its own in their place
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            await self._serve()
            await self._await_definitions(stop)
            if not stop.is_set():
                await handlers.watch(
                    self._queue.enqueue,
                    self._restore,
                    self._shut_down,
                    namespaces=self._options.namespaces,
                    in_cluster=self._options.kubeconfig is None,
                    stop=stop,
                )
            failed = [task.exception() for task in background if task.done() and not task.cancelled()]
            if error := next(filter(None, failed), None):
                raise error
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await self._shut_down()
            self._metrics.close()
            await self._engines.close()
            await self._api.close()

    async def _await_definitions(self, stop: asyncio.Event) -> None:
        """Wait for our kinds or the end: what is not served when Kopf begins to watch is never watched."""
        told: object = None
        while not stop.is_set():
            try:
                missing: object = await self._cluster.missing_kinds()
            except ApiError as error:
                missing = str(error)
            if not missing:
                return
            if missing != told:
                log.warning(
                    "definitions_missing", missing=missing, hint="kubectl apply --server-side -f crds/"
                )
                told = missing
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), DEFINITIONS_S)

    async def _look(self, key: Key) -> float | None:
        """One pass of the loop; the seconds until the next one."""
        try:
            look = await self._loop.run_once(key)
        except Exception:
            self._telemetry.look_failures.inc()
            raise
        if look is None:
            self._seen.pop(key, None)
            self._telemetry.forget(key)
            return REFUSED_S if key in self._loop.refused else None
        self._seen[key] = look
        return look.policy.pace.tick

    async def _look_now(self, key: Key) -> Look | None:
        await self._queue.look_now(key)
        return self._seen.get(key)

    async def _resync(self) -> None:
        for key in await self._cluster.keys():
            self._restore(key)

    def _restore(self, key: Key) -> None:
        """Apply what the resource owns once more, at once."""
        self._loop.forget(key)
        self._queue.enqueue(key)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(max(1.0, SWEEP_S * self._options.pace_scale))
            try:
                for key in await self._cluster.sweep():
                    self._queue.enqueue(key)
            except Exception as error:
                log.warning("sweep_failed", error=str(error))

    async def _wake(self) -> None:
        for key in await self._cluster.keys():
            self._queue.enqueue(key)

    async def _serve(self) -> None:
        options = self._options
        pages = web.Application()
        pages.add_routes([web.get("/metrics", self._metrics_page), web.get("/healthz", self._health)])
        await self._listen(pages, options.metrics_port)
        if options.alerts_token_file is None:
            log.info("alerts_closed", reason="no token file was given")
            return
        receiver = AlertReceiver(
            self._cluster,
            self._look_now,
            self._wake,
            self._telemetry.alert,
            token_file=options.alerts_token_file,
            ttl_s=BOOST_S * options.pace_scale,
            resolved_s=RESOLVED_S * options.pace_scale,
        )
        await self._listen(receiver.app(), options.alerts_port)

    async def _listen(self, app: web.Application, port: int) -> None:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, port=port).start()

    async def _metrics_page(self, _request: web.Request) -> web.Response:
        self._telemetry.queue_depth.set(self._queue.depth)
        return web.Response(
            body=self._telemetry.text(), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    async def _health(self, _request: web.Request) -> web.Response:
        idle = self._queue.idle_s
        healthy = idle < STUCK_S
        return web.json_response({"queueIdleSeconds": round(idle, 3)}, status=200 if healthy else 503)

    async def _shut_down(self) -> None:
        await self._queue.stop()
        while self._runners:
            await self._runners.pop().cleanup()


async def operate(options: Options) -> None:
    """Connect and run until told to stop.

    Raises:
        ValueError: a file or an option cannot be used.
    """
    if options.alerts_token_file is not None and options.alerts_port == options.metrics_port:
        raise ValueError(
            f"--alerts-port: must differ from --metrics-port, got {options.alerts_port} for both"
        )
    try:
        api = await KubernetesApi.connect(options.kubeconfig)
    except (ConfigException, YAMLError, TypeError) as error:  # TypeError: YAML, but no mapping
        told = " ".join(str(error).split())
        if options.kubeconfig is None:
            raise ValueError(f"--kubeconfig: required outside of a cluster ({told})") from error
        raise ValueError(f"--kubeconfig: cannot use {options.kubeconfig}: {told}") from error
    await Operator(options, api).run()
