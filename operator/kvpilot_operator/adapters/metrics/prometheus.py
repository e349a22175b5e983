"""Metrics from Prometheus: a few queries for up to a hundred resources at once.

Every figure comes from the server, its time included, so clocks need not agree. What is missing, stale, in
part or not finite is no sample; it is never zero.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import structlog
from prometheus_api_client import PrometheusApiClientException, PrometheusConnect
from urllib3.util.retry import Retry

from kvpilot_engine.contract import metrics as names
from kvpilot_operator.adapters.series import (
    COUNTERS,
    GAUGES,
    IncompleteSeriesError,
    SeriesKey,
    sample_from,
    series_key,
)
from kvpilot_operator.ports import Key, MetricsError
from kvpilot_operator.sources import Source
from kvpilot_operator.spec.fields import DNS_LABEL
from kvpilot_operator.tuning.observation import Sample

log = structlog.get_logger(__name__)

Windows = Mapping[str, float]

MOST_RESOURCES = 100
"""Resources in one set of queries."""

LEAST_SCRAPES = 4
"""Scrape intervals that a window must hold: below that ``increase`` gives wrong figures or none at all."""

SERIES = "kvpilot_series"
"""Label that carries the metric's name through ``increase``, which drops it."""

SCRAPES = "scrapes"
TIMESTAMP = "timestamp"


class _QueryError(MetricsError):
    """The source answered, but not this query: a smaller one may do."""


@dataclass
class _PodSeries:
    """What was read of one pod."""

    key: Key
    gauges: dict[SeriesKey, float] = field(default_factory=dict)
    increases: dict[float, dict[SeriesKey, float]] = field(default_factory=dict)
    scrapes: dict[float, float] = field(default_factory=dict)
    age_s: float | None = None


class _FormSession(requests.Session):
    """Sends what the client puts into the URL as a form: a hundred names are too long for some proxies."""

    def request(self, method: str, url: str, params: Any = None, **options: Any) -> requests.Response:  # type: ignore[override]
        return super().request(method, url, data=params, **options)


class PrometheusSource:
    """One Prometheus behind prometheus-api-client: time-outs, one retry, one kind of error.

    Args:
        timeout_s: longest wait for one answer; the server is told to give up a little earlier.
    """

    def __init__(self, source: Source, timeout_s: float = 5.0) -> None:
        self.source = source
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix=f"prometheus-{source.name}")
        session = _FormSession()
        # A proxy or .netrc of the environment must not replace the configured token.
        session.trust_env = False
        session.verify = source.ca_file or True
        session.hooks["response"].append(_refuse_partial)
        self._client = PrometheusConnect(
            url=source.url,
            session=session,
            method="POST",
            retry=Retry(
                total=1, read=False, backoff_factor=0.1, status_forcelist=[502, 504], allowed_methods=None,
                raise_on_status=False,
            ),
        )  # fmt: skip

    def close(self) -> None:
        """Close connections and threads; does not wait for a query that hangs."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    async def query(self, promql: str) -> list[dict[str, Any]]:
        """An instant query's vector.

        Raises:
            MetricsError: no answer, not in time, or not a whole vector.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._query, promql)

    def _query(self, promql: str) -> list[dict[str, Any]]:
        # Users of a resource see this: not a password within the URL.
        shown = re.sub(r"//[^/@]*@", "//", self.source.url)
        told = f"metrics source {self.source.name} ({shown})"
        try:
            self._client.headers = self._headers()
            result = self._client.custom_query(
                promql, params={"timeout": f"{self._timeout_s * 800:.0f}ms"}, timeout=self._timeout_s
            )
        except requests.JSONDecodeError as error:
            raise MetricsError(f"{told} did not answer with JSON; is the URL right?") from error
        except requests.Timeout as error:
            raise MetricsError(f"{told} did not answer within {self._timeout_s:g} s") from error
        except (requests.RequestException, OSError) as error:
            raise MetricsError(f"{told} cannot be read: {_root(error)}") from error
        except PrometheusApiClientException as error:
            raise _QueryError(f"{told} refused a query: {str(error)[:300]}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise MetricsError(f"{told} gave an answer without a result: {error!r}") from error
        if not isinstance(result, list) or not all(
            isinstance(row, dict) and "value" in row for row in result
        ):
            raise MetricsError(f"{told} did not answer with a vector")
        return result

    def _headers(self) -> dict[str, str]:
        if not self.source.token_file:
            return {}
        return {"Authorization": f"Bearer {Path(self.source.token_file).read_text().strip()}"}


def _refuse_partial(response: requests.Response, *_args: Any, **_kwargs: Any) -> None:
    """An answer with warnings may be a part of the data (Thanos, remote read); the client would drop them."""
    if response.status_code == 200 and b'"warnings"' in response.content:
        body = response.json()
        if isinstance(body, dict) and body.get("warnings"):
            raise PrometheusApiClientException(f"partial data: {'; '.join(map(str, body['warnings']))}")


def _root(error: BaseException) -> str:
    """The innermost reason of a chain of wrapped connection errors."""
    reason = getattr(error, "args", (error,))
    while reason and isinstance(reason[0], BaseException):
        error = getattr(reason[0], "reason", None) or reason[0]
        reason = error.args
    return re.sub(r"<[^>]*>(: )?", "", str(error))


class PrometheusMetrics:
    """The ``Metrics`` port over the configured sources.

    Calls that come in within ``linger_s`` of each other share their queries.

    Args:
        source_of: name of the source that a resource asks for.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        source_of: Callable[[Key], str],
        *,
        timeout_s: float = 5.0,
        linger_s: float = 0.01,
    ) -> None:
        self._sources = {name: PrometheusSource(source, timeout_s) for name, source in sources.items()}
        self._source_of = source_of
        self._linger_s = linger_s
        self._waiting: dict[str, list[tuple[Key, Windows, asyncio.Future[dict[str, Sample]]]]] = {}
        self._flushes: set[asyncio.Task[None]] = set()
        self._problems: dict[Key, str] = {}

    def close(self) -> None:
        """Close all sources."""
        for task in self._flushes:
            task.cancel()
        for source in self._sources.values():
            source.close()

    async def samples(self, windows: Mapping[Key, Windows]) -> dict[Key, dict[str, Sample]]:
        """Samples by pod UID of each resource.

        Raises:
            MetricsError: no resource could be read. Where some can, the others are left out.
        """
        asked = {key: self._enqueue(key, lengths) for key, lengths in windows.items()}
        await asyncio.gather(*asked.values(), return_exceptions=True)
        found: dict[Key, dict[str, Sample]] = {}
        failed: list[MetricsError] = []
        for key, future in asked.items():
            error = future.exception()
            if error is None:
                found[key] = future.result()
                self._tell(key, "")
            elif isinstance(error, MetricsError):
                self._tell(key, str(error))
                failed.append(error)
            else:
                raise error
        if failed and not found:
            raise failed[0]
        return found

    def _tell(self, key: Key, problem: str) -> None:
        """Log what changed, not every look."""
        if self._problems.get(key, "") == problem:
            return
        self._problems[key] = problem
        if problem:
            log.warning("metrics_unavailable", resource=str(key), error=problem)
        else:
            log.info("metrics_available", resource=str(key))
            del self._problems[key]

    def _enqueue(self, key: Key, windows: Windows) -> asyncio.Future[dict[str, Sample]]:
        future: asyncio.Future[dict[str, Sample]] = asyncio.get_running_loop().create_future()
        name = self._source_of(key)
        if problem := self._problem(name, key, windows):
            future.set_exception(MetricsError(problem))
            return future
        waiting = self._waiting.setdefault(name, [])
        waiting.append((key, windows, future))
        if len(waiting) == 1:
            task = asyncio.create_task(self._flush(name))
            self._flushes.add(task)
            task.add_done_callback(self._flushes.discard)
        return future

    def _problem(self, name: str, key: Key, windows: Windows) -> str:
        """Why a resource cannot be measured at all; "" when it can."""
        if name not in self._sources:
            return f"metrics source {name} is not configured; there is {', '.join(self._sources) or 'none'}"
        if not (DNS_LABEL.fullmatch(key.namespace) and DNS_LABEL.fullmatch(key.name)):
            return f"{key} is not a name that metrics can be asked for"
        source = self._sources[name].source
        shortest = min(windows, key=lambda window: windows[window])
        if windows[shortest] < LEAST_SCRAPES * source.scrape_interval:
            return (
                f"ScrapeTooSlow: window {shortest} of {windows[shortest]:g} s is below {LEAST_SCRAPES} "
                f"scrape intervals of metrics source {name} ({source.scrape_interval:g} s)"
            )
        return ""

    async def _flush(self, name: str) -> None:
        await asyncio.sleep(self._linger_s)
        waiting = self._waiting.pop(name)
        for start in range(0, len(waiting), MOST_RESOURCES):
            await self._answer(name, waiting[start : start + MOST_RESOURCES])

    async def _answer(
        self, name: str, batch: list[tuple[Key, Windows, asyncio.Future[dict[str, Sample]]]]
    ) -> None:
        """Read a batch; one that is refused is halved until the culprit is alone."""
        source = self._sources[name]
        try:
            found = await _read(source, {key: windows for key, windows, _ in batch})
        except _QueryError as error:
            if len(batch) > 1:
                middle = len(batch) // 2
                await self._answer(name, batch[:middle])
                await self._answer(name, batch[middle:])
            else:
                _fail(batch, error)
        except Exception as error:
            _fail(batch, error)
        else:
            for key, _, future in batch:
                if not future.done():
                    future.set_result(found.get(key, {}))


def _fail(batch: Iterable[tuple[Key, Windows, asyncio.Future[dict[str, Sample]]]], error: Exception) -> None:
    for _, _, future in batch:
        if not future.done():
            future.set_exception(error)


async def _read(source: PrometheusSource, windows: Mapping[Key, Windows]) -> dict[Key, dict[str, Sample]]:
    """All pods of some resources: one query for the last values, and one per length of window."""
    lengths: dict[float, set[Key]] = {}
    for key, wanted in windows.items():
        for length in wanted.values():
            lengths.setdefault(_whole(length), set()).add(key)
    answers = await asyncio.gather(
        source.query(gauges_query(windows)),
        *(source.query(increases_query(keys, length)) for length, keys in lengths.items()),
        return_exceptions=True,
    )
    last, *increases = (_whole_answer(answer) for answer in answers)
    pods: dict[str, _PodSeries] = {}
    for row in last:
        _take_last(pods, row, windows)
    for length, rows in zip(lengths, increases, strict=True):
        for row in rows:
            _take_increase(pods, row, length)
    found: dict[Key, dict[str, Sample]] = {key: {} for key in windows}
    for uid, pod in pods.items():
        try:
            found[pod.key][uid] = _sample(pod, windows[pod.key], source.source.scrape_interval)
        except IncompleteSeriesError as error:
            # The resource's condition tells this to people, once.
            log.debug("pod_without_sample", resource=str(pod.key), pod_uid=uid, error=str(error))
    return found


def _whole_answer(answer: list[dict[str, Any]] | BaseException) -> list[dict[str, Any]]:
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _whole(length: float) -> float:
    """Windows in whole seconds share their queries."""
    return max(1.0, round(length))


def selector(keys: Iterable[Key]) -> str:
    """Label matchers of the engines of some resources; the cross product is narrowed afterwards."""
    listed = sorted(keys)
    namespaces = "|".join(sorted({key.namespace for key in listed}))
    resources = "|".join(sorted({key.name for key in listed}))
    return f'namespace=~"{namespaces}",kvpilot_name=~"{resources}",component="engine",pod_uid!=""'


def gauges_query(keys: Iterable[Key]) -> str:
    """Last values, and the time of the last scrape."""
    match = selector(keys)
    last = f'{{__name__=~"{"|".join(GAUGES)}",{match}}}'
    scraped = f"timestamp({names.CONFIG_GENERATION}{{{match}}})"
    return f"label_replace({scraped}, {SERIES!r}, {TIMESTAMP!r}, '', '') or {last}"


def increases_query(keys: Iterable[Key], length: float) -> str:
    """Increases of all counters over ``length`` s, and the number of scrapes in it."""
    match = selector(keys)
    parts = [(name, f"increase({name}{{{match}}}[{length:g}s])") for name in COUNTERS]
    parts.append((SCRAPES, f"count_over_time({names.CONFIG_GENERATION}{{{match}}}[{length:g}s])"))
    return " or ".join(f"label_replace({query}, {SERIES!r}, {name!r}, '', '')" for name, query in parts)


def _take_last(pods: dict[str, _PodSeries], row: Mapping[str, Any], windows: Mapping[Key, Windows]) -> None:
    labels = dict(row["metric"])
    key = Key(labels.get("namespace", ""), labels.get("kvpilot_name", ""))
    if key not in windows:
        return
    pod = pods.setdefault(labels["pod_uid"], _PodSeries(key))
    now, value = float(row["value"][0]), float(row["value"][1])
    if labels.get(SERIES) == TIMESTAMP:
        pod.age_s = max(0.0, now - value)
    else:
        pod.gauges[series_key(labels)] = value


def _take_increase(pods: Mapping[str, _PodSeries], row: Mapping[str, Any], length: float) -> None:
    """One increase; a pod without last values has vanished and is left out."""
    labels = dict(row["metric"])
    pod = pods.get(labels["pod_uid"])
    if pod is None:
        return
    series = labels.pop(SERIES)
    value = float(row["value"][1])
    if series == SCRAPES:
        pod.scrapes[length] = value
    else:
        pod.increases.setdefault(length, {})[series_key(labels, series)] = value


def _sample(pod: _PodSeries, windows: Windows, scrape_interval: float) -> Sample:
    if pod.age_s is None:
        raise IncompleteSeriesError(f"last values: no series of {names.CONFIG_GENERATION}")
    covered = {
        window: min(length, pod.scrapes.get(_whole(length), 0.0) * scrape_interval)
        for window, length in windows.items()
    }
    return sample_from(
        {window: pod.increases.get(_whole(length), {}) for window, length in windows.items()},
        pod.gauges,
        covered,
        pod.age_s,
        covered[max(windows, key=lambda window: windows[window])],
    )
