"""Metrics from Prometheus: a few queries for up to a hundred resources at once.

Every figure and time comes from the server, so clocks need not agree. Missing, stale, partial or non-finite
data gives no sample; it is never zero.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests
import structlog
from prometheus_api_client import PrometheusApiClientException, PrometheusConnect
from urllib3.util.retry import Retry

from kvpilot_engine.contract import metrics as names
from kvpilot_operator.adapters.metrics.series import (
    COUNTERS,
    GAUGES,
    OPTIONAL_COUNTERS,
    OPTIONAL_GAUGES,
    IncompleteSeriesError,
    SeriesKey,
    own_labels,
    sample_from,
    series_key,
)
from kvpilot_operator.adapters.metrics.sources import Source
from kvpilot_operator.ports import MetricsError
from kvpilot_operator.resource.fields import DNS_LABEL
from kvpilot_operator.status.snapshot import Key
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.observation import Sample
from kvpilot_operator.tuning.pace import MIN_SCRAPES

log = structlog.get_logger(__name__)

Windows = Mapping[str, float]

MAX_RESOURCES = 100
"""Resources in one set of queries."""

SERIES = "kvpilot_series"
"""Label that carries the metric's name through ``increase``, which drops it."""

POD_LABELS = frozenset({"__name__", "namespace", "kvpilot_name", "pod", "pod_uid", "component", SERIES})
"""Labels that say which pod a series is of; the same engine has the same ones wherever it is scraped."""

STILL_GOOD = 0.75
"""An origin of a pod is used on while it has this share of the scrapes of the best one."""

SCRAPES = "scrapes"
TIMESTAMP = "timestamp"


class _QueryError(MetricsError):
    """The source answered, but not this query: a smaller one may do."""


Origin = tuple[tuple[str, str], ...]
"""Labels of a series that the contract does not know: job, instance, endpoint, prometheus_replica, ..."""


@dataclass
class _PodSeries:
    """Values read for one pod from one origin."""

    key: Key
    gauges: dict[SeriesKey, float] = field(default_factory=dict)
    increases: dict[float, dict[SeriesKey, float]] = field(default_factory=dict)
    scrapes: dict[float, float] = field(default_factory=dict)
    age_s: float | None = None

    def rank(self) -> tuple[float, float]:
        """Scrapes in all windows, then freshness: the origin with most is used."""
        return sum(self.scrapes.values()), -(self.age_s if self.age_s is not None else float("inf"))


class _FormSession(requests.Session):
    """Sends queries as a form: a hundred names in a URL are too long for some proxies."""

    def request(self, method: str, url: str, params: Any = None, **options: Any) -> requests.Response:  # type: ignore[override]
        return super().request(method, url, data=params, **options)


class PrometheusSource:
    """One Prometheus behind prometheus-api-client: time-outs, one retry, one kind of error.

    Args:
        timeout_s: longest wait for one answer, s; the server's own limit is a little shorter.
    """

    def __init__(self, source: Source, timeout_s: float = 5.0) -> None:
        self.source = source
        self._timeout_s = timeout_s
        self._origins: dict[str, tuple[Origin, set[Origin]]] = {}
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

    def choose_origin(self, uid: str, best: Origin, scraped: set[Origin]) -> Origin:
        """The origin whose series are used for a pod: ``best`` at first, and again when the origins change.

        That an engine is scraped more than once is logged when that changes.
        """
        used, known = self._origins.get(uid, (best, {best}))
        if scraped == known or len(scraped) < 2:
            return used if used in scraped else best
        self._origins[uid] = (best, scraped)
        ignored = [dict(origin) for origin in sorted(scraped - {best})]
        log.warning(
            "duplicate_series", source=self.source.name, pod_uid=uid, used=dict(best), ignored=ignored
        )
        return best

    def close(self) -> None:
        """Close connections and threads; does not wait for a query that hangs."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    async def query(self, promql: str) -> list[dict[str, Any]]:
        """An instant query's vector.

        Raises:
            MetricsError: no answer in time, or not a whole vector.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._query, promql)

    async def query_range(self, promql: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """A query at every ``step`` s from ``start`` to ``end`` (s since the epoch): the matrix.

        Raises:
            MetricsError: no answer in time, or not a whole matrix.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._query_range, promql, start, end, step)

    def _query(self, promql: str) -> list[dict[str, Any]]:
        def ask() -> Any:
            return self._client.custom_query(promql, params=self._limit, timeout=self._timeout_s)

        return self._answer(ask, "value", "a vector")

    def _query_range(self, promql: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        first, last = (datetime.fromtimestamp(at, UTC) for at in (start, end))

        def ask() -> Any:
            return self._client.custom_query_range(
                promql, first, last, f"{step:g}s", params=self._limit, timeout=self._timeout_s
            )

        return self._answer(ask, "values", "a matrix")

    @property
    def _limit(self) -> dict[str, str]:
        return {"timeout": f"{self._timeout_s * 800:.0f}ms"}

    def _answer(self, ask: Callable[[], Any], holds: str, kind: str) -> list[dict[str, Any]]:
        # Users of a resource see this message: it must not hold a password of the URL.
        shown = re.sub(r"//[^/@]*@", "//", self.source.url)
        reported = f"metrics source {self.source.name} ({shown})"
        try:
            self._client.headers = self._headers()
            result = ask()
        except requests.JSONDecodeError as error:
            raise MetricsError(f"{reported} did not answer with JSON; is the URL right?") from error
        except requests.Timeout as error:
            raise MetricsError(f"{reported} did not answer within {self._timeout_s:g} s") from error
        except (requests.RequestException, OSError) as error:
            raise MetricsError(f"{reported} cannot be read: {_root(error)}") from error
        except PrometheusApiClientException as error:
            raise _QueryError(f"{reported} refused a query: {str(error)[:300]}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise MetricsError(f"{reported} gave an answer without a result: {error!r}") from error
        if not isinstance(result, list) or not all(isinstance(row, dict) and holds in row for row in result):
            raise MetricsError(f"{reported} did not answer with {kind}")
        return result

    def _headers(self) -> dict[str, str]:
        if not self.source.token_file:
            return {}
        return {"Authorization": f"Bearer {Path(self.source.token_file).read_text().strip()}"}


def _refuse_partial(response: requests.Response, *_args: Any, **_kwargs: Any) -> None:
    """Refuse an answer with warnings: it may hold only a part of the data (Thanos, remote read)."""
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
        source_of: returns the name of a resource's source.
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

    def scrape_s(self, key: Key) -> float:
        """Interval of the scrapes as the resource's source is configured, s; 0 without such a source."""
        source = self._sources.get(self._source_of(key))
        return 0.0 if source is None else source.source.scrape_interval

    def close(self) -> None:
        """Close all sources."""
        for task in self._flushes:
            task.cancel()
        for source in self._sources.values():
            source.close()

    async def samples(self, windows: Mapping[Key, Windows]) -> dict[Key, dict[str, Sample]]:
        """Samples by pod UID of each resource.

        Raises:
            MetricsError: no resource could be read. If some can be, the others are left out.
        """
        asked = {key: self._enqueue(key, lengths) for key, lengths in windows.items()}
        await asyncio.gather(*asked.values(), return_exceptions=True)
        found: dict[Key, dict[str, Sample]] = {}
        failed: list[MetricsError] = []
        for key, future in asked.items():
            error = future.exception()
            if error is None:
                found[key] = future.result()
                self._notify(key, "")
            elif isinstance(error, MetricsError):
                self._notify(key, str(error))
                failed.append(error)
            else:
                raise error
        if failed and not found:
            raise failed[0]
        return found

    def _notify(self, key: Key, problem: str) -> None:
        """Log a problem when it changes, not at every reconcile."""
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
        if (problem := self._problem(name, key, windows)) is not None:
            future.set_exception(problem)
            return future
        waiting = self._waiting.setdefault(name, [])
        waiting.append((key, windows, future))
        if len(waiting) == 1:
            task = asyncio.create_task(self._flush(name))
            self._flushes.add(task)
            task.add_done_callback(self._flushes.discard)
        return future

    def _problem(self, name: str, key: Key, windows: Windows) -> MetricsError | None:
        """Why a resource cannot be measured; None if it can."""
        if name not in self._sources:
            there = ", ".join(self._sources) or "none"
            return MetricsError(f"metrics source {name} is not configured; there is {there}")
        if not (DNS_LABEL.fullmatch(key.namespace) and DNS_LABEL.fullmatch(key.name)):
            return MetricsError(f"{key} is not a name that metrics can be asked for")
        source = self._sources[name].source
        shortest = min(windows, key=lambda window: windows[window])
        if windows[shortest] < MIN_SCRAPES * source.scrape_interval:
            return MetricsError(
                f"window {shortest} of {windows[shortest]:g} s is below {MIN_SCRAPES} scrape intervals of "
                f"metrics source {name} ({source.scrape_interval:g} s)",
                reasons.SCRAPE_TOO_SLOW,
            )
        return None

    async def _flush(self, name: str) -> None:
        await asyncio.sleep(self._linger_s)
        waiting = self._waiting.pop(name)
        for start in range(0, len(waiting), MAX_RESOURCES):
            await self._answer(name, waiting[start : start + MAX_RESOURCES])

    async def _answer(
        self, name: str, batch: list[tuple[Key, Windows, asyncio.Future[dict[str, Sample]]]]
    ) -> None:
        """Read a batch; bisect one that is refused until the culprit is alone."""
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
    origins: dict[str, dict[Origin, _PodSeries]] = {}
    for row in last:
        _take_last(origins, row, windows)
    for length, rows in zip(lengths, increases, strict=True):
        for row in rows:
            _take_increase(origins, row, length)
    found: dict[Key, dict[str, Sample]] = {key: {} for key in windows}
    for uid, by_origin in origins.items():
        pod = _one_origin(source, uid, by_origin)
        try:
            found[pod.key][uid] = _sample(pod, windows[pod.key])
        except IncompleteSeriesError as error:
            # The resource's condition reports this.
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
    last = f'{{__name__=~"{"|".join((*GAUGES, *OPTIONAL_GAUGES))}",{match}}}'
    scraped = f"timestamp({names.CONFIG_GENERATION}{{{match}}})"
    return f"label_replace({scraped}, {SERIES!r}, {TIMESTAMP!r}, '', '') or {last}"


def increases_query(keys: Iterable[Key], length: float) -> str:
    """Increases of all counters over ``length`` s, and the number of scrapes in it."""
    match = selector(keys)
    parts = [(name, f"increase({name}{{{match}}}[{length:g}s])") for name in (*COUNTERS, *OPTIONAL_COUNTERS)]
    parts.append((SCRAPES, f"count_over_time({names.CONFIG_GENERATION}{{{match}}}[{length:g}s])"))
    return " or ".join(f"label_replace({query}, {SERIES!r}, {name!r}, '', '')" for name, query in parts)


def _one_origin(source: PrometheusSource, uid: str, by_origin: Mapping[Origin, _PodSeries]) -> _PodSeries:
    """One of the origins of a pod, the same one while it will do: an engine scraped twice counts once."""
    best = max(sorted(by_origin), key=lambda origin: by_origin[origin].rank())
    scraped = {origin for origin, pod in by_origin.items() if pod.age_s is not None}
    used = source.choose_origin(uid, best, scraped)
    if by_origin[used].rank()[0] < STILL_GOOD * by_origin[best].rank()[0]:
        used = best
    return by_origin[used]


def origin_of(labels: Mapping[str, str], exposed: str) -> Origin:
    """Where a series came from: its labels without those of the contract and of the pod."""
    known = own_labels(exposed) | POD_LABELS
    return tuple(sorted((label, value) for label, value in labels.items() if label not in known))


def _take_last(
    origins: dict[str, dict[Origin, _PodSeries]], row: Mapping[str, Any], windows: Mapping[Key, Windows]
) -> None:
    labels = dict(row["metric"])
    key = Key(labels.get("namespace", ""), labels.get("kvpilot_name", ""))
    if key not in windows:
        return
    exposed = labels.get("__name__", names.CONFIG_GENERATION)
    by_origin = origins.setdefault(labels["pod_uid"], {})
    pod = by_origin.setdefault(origin_of(labels, exposed), _PodSeries(key))
    now, value = float(row["value"][0]), float(row["value"][1])
    if labels.get(SERIES) == TIMESTAMP:
        pod.age_s = max(0.0, now - value)
    else:
        pod.gauges[series_key(labels)] = value


def _take_increase(
    origins: Mapping[str, Mapping[Origin, _PodSeries]], row: Mapping[str, Any], length: float
) -> None:
    """One increase; a pod without last values no longer exists and is left out."""
    labels = dict(row["metric"])
    series = labels.pop(SERIES)
    exposed = names.CONFIG_GENERATION if series == SCRAPES else series
    pod = origins.get(labels["pod_uid"], {}).get(origin_of(labels, exposed))
    if pod is None:
        return
    value = float(row["value"][1])
    if series == SCRAPES:
        pod.scrapes[length] = value
    else:
        pod.increases.setdefault(length, {})[series_key(labels, series)] = value


def _sample(pod: _PodSeries, windows: Windows) -> Sample:
    """The sample of a pod; the shortest window shows how often it is really scraped.

    A window is covered if it holds as many scrapes as the shortest one implies, but for one at its edge.
    """
    if pod.age_s is None:
        raise IncompleteSeriesError(f"last values: no series of {names.CONFIG_GENERATION}")
    shortest = min(windows.values())
    seen = pod.scrapes.get(_whole(shortest), 0.0)
    scrape_s = shortest / seen if seen else 0.0

    def covered(length: float) -> float:
        there = pod.scrapes.get(_whole(length), 0.0)
        return length if 0 < (seen - 1) * length / shortest <= there else min(length, there * scrape_s)

    return sample_from(
        {window: pod.increases.get(_whole(length), {}) for window, length in windows.items()},
        pod.gauges,
        {window: covered(length) for window, length in windows.items()},
        pod.age_s,
        covered(max(windows.values())),
        scrape_s=scrape_s,
    )
