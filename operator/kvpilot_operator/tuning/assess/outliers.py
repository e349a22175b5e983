"""Replicas that differ from the others by themselves: a slow device, a noisy neighbour, a bad node.

A knob of all replicas does not cure one of them. An outlier is named, takes part in no experiment, and does
not count for a diagnosis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from kvpilot_operator.tuning.assess.objectives import MIN_JUDGED
from kvpilot_operator.tuning.observation import NO_COUNTS, Counts, ObservedReplica

MIN_REPLICAS = 3
"""Fewer replicas have no majority that one could differ from."""

SLOWER = 1.4
"""A replica that advances as many rows so many times slower than the median is an outlier: twice the scatter
of equal engines on unequal machines."""

MORE_ERRORS = 0.1
"""A replica is an outlier if it fails this share of its requests more than the median."""

MIN_SECONDS = 1.0
"""Time in steps of a bucket of rows from which on its rate counts."""


@dataclass(frozen=True)
class Outlier:
    """A replica and how it differs, as a clause."""

    uid: str
    name: str
    clause: str


def outliers(replicas: Iterable[ObservedReplica]) -> tuple[Outlier, ...]:
    """The outliers among replicas of one configuration; at most a minority, over the long window."""
    counts = {
        replica.uid: (replica.name, replica.sample.windows.get("long", NO_COUNTS))
        for replica in replicas
        if replica.sample is not None
    }
    if len(counts) < MIN_REPLICAS:
        return ()
    slow = _slowness({uid: item for uid, (_, item) in counts.items()})
    failing = _failing({uid: item for uid, (_, item) in counts.items()})
    found = []
    for uid, (name, _) in counts.items():
        if slow.get(uid, 1.0) >= SLOWER:
            found.append(Outlier(uid, name, "its steps are slower than those of the other replicas"))
        elif failing.get(uid, 0.0) >= MORE_ERRORS:
            found.append(Outlier(uid, name, "it fails more requests than the other replicas"))
    return tuple(found) if 2 * len(found) < len(counts) else ()


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
    """Share of failed requests beyond the median's; what a replica sheds hides none."""
    shares = {uid: item.errors / item.admitted for uid, item in counts.items() if item.admitted >= MIN_JUDGED}
    if len(shares) < MIN_REPLICAS:
        return {}
    middle = median(shares.values())
    return {uid: share - middle for uid, share in shares.items()}
