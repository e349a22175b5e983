"""The operator process: reconciler, queue, watches, and two HTTP ports."""

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

from kvpilot_operator.adapters.engines.kvpilot import EngineAdmin
from kvpilot_operator.adapters.kubernetes.api import ApiError, KubernetesApi
from kvpilot_operator.adapters.kubernetes.cluster import KubernetesCluster
from kvpilot_operator.adapters.metrics.prometheus import PrometheusMetrics
from kvpilot_operator.adapters.metrics.sources import load_sources
from kvpilot_operator.cluster import handlers
from kvpilot_operator.cluster.alerts import AlertReceiver
from kvpilot_operator.cluster.metrics import OperatorMetrics
from kvpilot_operator.cluster.switch import KillSwitch
from kvpilot_operator.reconcile.fleet import Fleet
from kvpilot_operator.reconcile.queue import KeyedQueue
from kvpilot_operator.reconcile.reconciler import Reconciler, Reconciliation
from kvpilot_operator.status.snapshot import Key

log = structlog.get_logger(__name__)

BOOST_S, RESOLVED_S, SWEEP_S = 600.0, 60.0, 10.0
"""Life of an alert's boost, its rest when the alert is resolved, and the time between two sweeps of expired
overrides, s; scaled like every other duration."""

SETTLE_S = 0.5
"""Time from a changed override to the report on it, s: several that come together are one report."""

SWITCH_S = 5.0
"""Time between two reads of the ConfigMap of the kill switch, s; scaled like every other duration."""

REFUSED_S = 30.0
"""Time between two reconciles of a refused resource, s: no event comes when the cause goes."""

DEFINITIONS_S = 1.0
"""Time between two checks for definitions that are missing at the start, s."""

STUCK_S = 60.0
"""/healthz fails when the queue stands still, or one reconcile runs, for this long, s."""


@dataclass(frozen=True)
class OperatorOptions:
    """Options of ``kvpilot operator``.

    Attributes:
        kubeconfig: None inside a pod.
        alerts_token_file: None leaves /alerts closed.
        namespaces: watched ones; none for all.
        tuning: False makes no change and takes running candidates back.
        tuning_config_map: switches tuning off with ``tuning: "off"`` while the operator runs; None for none.
    """

    sources_file: Path
    key_file: Path
    kubeconfig: Path | None = None
    alerts_token_file: Path | None = None
    namespaces: tuple[str, ...] = ()
    pace_scale: float = 1.0
    metrics_port: int = 8080
    alerts_port: int = 8081
    tuning: bool = True
    tuning_config_map: Key | None = None


class Operator:
    """One running operator. ``run`` returns after a stop signal, once what is in progress has finished."""

    def __init__(self, options: OperatorOptions, api: KubernetesApi) -> None:
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
        self._fleet = Fleet(pace_scale=options.pace_scale)
        self._switch = KillSwitch(
            api,
            self._fleet,
            enabled=options.tuning,
            config_map=options.tuning_config_map,
            changed=self._wake,
        )
        self._loop = Reconciler(
            self._cluster,
            self._metrics,
            self._engines,
            pace_scale=options.pace_scale,
            telemetry=self._telemetry,
            fleet=self._fleet,
        )
        self._queue = KeyedQueue(self._reconcile, self._resync)
        self._overridden = asyncio.Event()
        self._seen: dict[Key, Reconciliation] = {}
        self._runners: list[web.AppRunner] = []

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            Exception: a background task ended by itself.
        """
        stop = asyncio.Event()
        background = [
            asyncio.create_task(self._queue.run(), name="queue"),
            asyncio.create_task(self._sweep(), name="sweep"),
            asyncio.create_task(
                self._switch.watch(max(1.0, SWITCH_S * self._options.pace_scale)), name="switch"
            ),
        ]
        for task in background:
            task.add_done_callback(lambda _: stop.set())
        for number in (signal.SIGTERM, signal.SIGINT):  # until Kopf installs its own
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            await self._serve()
            await self._await_definitions(stop)
            await self._count(stop)
            if not stop.is_set():
                await handlers.watch(
                    self._queue.enqueue,
                    self._restore,
                    self._shut_down,
                    self._overridden.set,
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
        """Wait for our kinds, or for the end: Kopf never watches a kind that is not served when it starts."""
        reported: object = None
        while not stop.is_set():
            try:
                missing: object = await self._cluster.missing_kinds()
            except ApiError as error:
                missing = str(error)
            if not missing:
                return
            if missing != reported:
                log.warning(
                    "definitions_missing", missing=missing, hint="kubectl apply --server-side -f crds/"
                )
                reported = missing
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), DEFINITIONS_S)

    async def _count(self, stop: asyncio.Event) -> None:
        """Read the kill switch and every status before the first change may begin."""
        while not stop.is_set():
            try:
                await self._switch.read()
                self._fleet.rebuild(await self._cluster.statuses())
            except ApiError as error:
                log.warning("fleet_not_read", error=str(error))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), DEFINITIONS_S)
            else:
                return

    async def _reconcile(self, key: Key) -> float | None:
        """Reconcile; returns the seconds until the next reconcile."""
        try:
            result = await self._loop.run_once(key)
        except Exception:
            self._telemetry.reconcile_failures.inc()
            raise
        if result is None:
            self._seen.pop(key, None)
            self._telemetry.forget(key)
            return REFUSED_S if key in self._loop.refused else None
        self._seen[key] = result
        return result.policy.pace.tick

    async def _reconcile_now(self, key: Key) -> Reconciliation | None:
        await self._queue.reconcile_now(key)
        return self._seen.get(key)

    async def _resync(self) -> None:
        statuses = await self._cluster.statuses()
        self._fleet.rebuild(statuses)
        for key in statuses:
            self._restore(key)

    def _restore(self, key: Key) -> None:
        """Apply the owned objects again, at once."""
        self._loop.forget(key)
        self._queue.enqueue(key)

    async def _sweep(self) -> None:
        """Delete expired overrides and report on the others, at intervals and when one changes."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(1.0, SWEEP_S * self._options.pace_scale)):
                    await self._overridden.wait()
                    await asyncio.sleep(SETTLE_S)
            self._overridden.clear()
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
            self._reconcile_now,
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
        self._telemetry.fleet(tuning=not self._fleet.off, recommend_only=self._fleet.recommend_only())
        return web.Response(
            body=self._telemetry.text(), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    async def _health(self, _request: web.Request) -> web.Response:
        return health(self._queue)

    async def _shut_down(self) -> None:
        await self._queue.stop()
        while self._runners:
            await self._runners.pop().cleanup()


def health(queue: KeyedQueue) -> web.Response:
    """The page /healthz: 503 when the queue stands still or a reconcile hangs."""
    ages = {
        "secondsSinceQueueRan": round(queue.idle_s, 3),
        "secondsOfLongestReconcile": round(queue.oldest_reconcile_s, 3),
    }
    return web.json_response(ages, status=200 if max(ages.values()) < STUCK_S else 503)


async def operate(options: OperatorOptions) -> None:
    """Connect and run until a stop signal.

    Raises:
        ValueError: a file or an option cannot be used.
    """
    if options.alerts_token_file is not None and options.alerts_port == options.metrics_port:
        raise ValueError(
            f"--alerts-port: must differ from --metrics-port, got {options.alerts_port} for both"
        )
    try:
        api = await KubernetesApi.connect(options.kubeconfig)
    except (ConfigException, YAMLError, TypeError) as error:  # TypeError: YAML that is no mapping
        reported = " ".join(str(error).split())
        if options.kubeconfig is None:
            raise ValueError(f"--kubeconfig: required outside of a cluster ({reported})") from error
        raise ValueError(f"--kubeconfig: cannot use {options.kubeconfig}: {reported}") from error
    await Operator(options, api).run()
