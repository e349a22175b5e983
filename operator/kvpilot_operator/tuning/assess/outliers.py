"""Replicas that differ from the others by themselves: a slow device, a noisy neighbour, a leak, a cold cache.

A knob of all replicas does not cure one of them. An outlier is named, takes part in no experiment, and does
not count for a diagnosis.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from statistics import median

from kvpilot_operator.tuning.assess.objectives import MIN_JUDGED, enough, hit_rate
from kvpilot_operator.tuning.observation import NO_COUNTS, Counts, ObservedReplica

MIN_REPLICAS = 3
"""Fewer replicas have no majority that one could differ from."""

SLOWER = 1.4
"""A replica that advances as many rows so many times slower than the median is an outlier: twice the scatter
of equal engines on unequal machines."""

MORE_ERRORS = 0.1
"""A replica is an outlier if it fails this share of its requests more than the median."""

MORE_MEMORY = 0.15
"""A replica over the memory objective is an outlier if the median is within it, and lower by this share of
the limit. Where the others are nearly as full, it is the load or the configuration of all."""

FEWER_HITS = 0.3
"""A replica is an outlier if its hit rate is lower than the median by this share of the tokens, and less than
half of it: what different prefixes make of equal caches is less."""

SLOW = "its steps are slower than those of the other replicas"
FAILING = "it fails more requests than the other replicas"
FULLER = "its memory is far fuller than that of the other replicas"
COLD = "its cache is far colder than those of the other replicas"
"""What is said of an outlier."""

MIN_SECONDS = 1.0
"""Time in steps of a bucket of rows from which on its rate counts."""


@dataclass(frozen=True)
class Outlier:
    """A replica and how it differs, as a clause."""

    uid: str
    name: str
    clause: str


def outliers(
    replicas: Collection[ObservedReplica], trusted: Collection[ObservedReplica], memory: float
) -> tuple[Outlier, ...]:
    """The outliers among replicas of one configuration; at most a minority, over the long window.

    Args:
        replicas: those that run one configuration.
        trusted: those and the ones that run a candidate: the memory of all is compared.
        memory: share of the memory limit that the objective allows.
    """
    counts = {
        replica.uid: replica.sample.windows.get("long", NO_COUNTS)
        for replica in replicas
        if replica.sample is not None
    }
    slow, failing, cold = _slowness(counts), _failing(counts), _cold(counts)
    clauses = {  # the last that holds of a replica counts
        **dict.fromkeys(cold, COLD),
        **{uid: FAILING for uid, more in failing.items() if more >= MORE_ERRORS},
        **{uid: SLOW for uid, times in slow.items() if times >= SLOWER},
        **dict.fromkeys(_full(replicas, trusted, memory), FULLER),
    }
    found = tuple(Outlier(r.uid, r.name, clauses[r.uid]) for r in replicas if r.uid in clauses)
    return found if 2 * len(found) < len(trusted) else ()


def _slowness(counts: dict[str, Counts]) -> dict[str, float]:
    """How many times slower than the median each replica advances rows, over the buckets they share."""
    logs: dict[str, list[tuple[float, float]]] = {}
    for bucket in {bucket for item in counts.values() for bucket in item.bucket_seconds}:
        rates = {
            uid: item.bucket_rows.get(bucket, 0.0) / seconds
            for uid, item in counts.items()
            if (seconds := item.bucket_seconds.get(bucket, 0.0)) >= MIN_SECONDS
        }
        if len(rates) < MIN_REPLICAS or min(rates.values()) <= 0:
            continue
        middle = median(rates.values())
        for uid, rate in rates.items():
            logs.setdefault(uid, []).append((counts[uid].bucket_seconds[bucket], math.log(middle / rate)))
    return {
        uid: math.exp(sum(weight * log for weight, log in parts) / sum(weight for weight, _ in parts))
        for uid, parts in logs.items()
    }


def _failing(counts: dict[str, Counts]) -> dict[str, float]:
    """Share of failed requests beyond the median's; what a replica sheds hides none.

    All have the same quota: who sends a replica requests that are too large makes it no outlier.
    """
    counts = {uid: item.of_any_length() for uid, item in counts.items()}
    shares = {uid: item.errors / item.admitted for uid, item in counts.items() if item.admitted >= MIN_JUDGED}
    if len(shares) < MIN_REPLICAS:
        return {}
    middle = median(shares.values())
    return {uid: share - middle for uid, share in shares.items()}


def _full(
    replicas: Collection[ObservedReplica], trusted: Collection[ObservedReplica], allowed: float
) -> set[str]:
    """Replicas whose memory is over what is allowed, while that of most others is far below theirs.

    Also below those of their own configuration: where a candidate relieves memory, its controls stay full.
    """
    ratios, alike = (
        {r.uid: r.sample.gauges.memory_ratio for r in some if r.sample is not None}
        for some in (trusted, replicas)
    )
    if len(ratios) < MIN_REPLICAS or not alike or (middle := median(ratios.values())) > allowed:
        return set()
    middle = max(middle, median(alike.values()))
    return {uid for uid, ratio in alike.items() if ratio > allowed and ratio - middle >= MORE_MEMORY}


def _cold(counts: dict[str, Counts]) -> set[str]:
    """Replicas whose cache serves far less than those of most others."""
    rates = {
        uid: rate for uid, item in counts.items() if enough(item) and (rate := hit_rate(item)) is not None
    }
    if len(rates) < MIN_REPLICAS:
        return set()
    middle = median(rates.values())
    return {uid for uid, rate in rates.items() if middle - rate >= FEWER_HITS and rate < middle / 2}
