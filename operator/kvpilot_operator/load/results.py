"""Results of the requests of a load, and their summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

OK = "ok"
ERROR_KINDS = {
    "shed": "refused with 429",
    "refused": "refused with another 4xx",
    "server": "5xx",
    "timeout": "no answer in time",
    "connection": "connection refused or lost",
    "protocol": "the answer could not be read",
    "cancelled": "cancelled when the load was stopped",
}
"""Kinds of failed requests, with their meaning."""


@dataclass(frozen=True, slots=True)
class RequestResult:
    """Result of one request.

    Attributes:
        at: when it was due, s from the start of the load.
        late: how much later it was sent, s: the delay of the generator itself.
        seconds: from when it was due to the end of the answer, s; this includes ``late``.
        kind: ``ok`` or a key of ``ERROR_KINDS``.
        first_token: from when it was due to the first token, s; None unless streamed.
        prompt_tokens, cached_tokens, output_tokens: as the server reports them.
    """

    phase: str
    at: float
    late: float
    seconds: float
    kind: str = OK
    message: str = ""
    first_token: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """Nearest-rank percentile of sorted values; None if there are none."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


def quantiles(values: Iterable[float]) -> dict[str, float | None]:
    """p50, p95, p99, mean and max of latencies, s."""
    ordered = sorted(values)
    mean = sum(ordered) / len(ordered) if ordered else None
    return {
        "p50": percentile(ordered, 0.50),
        "p95": percentile(ordered, 0.95),
        "p99": percentile(ordered, 0.99),
        "mean": mean,
        "max": ordered[-1] if ordered else None,
    }


@dataclass
class Tally:
    """Results so far; ``probed`` are the latencies of the probes, s, which no figure includes."""

    offered: int = 0
    results: list[RequestResult] = field(default_factory=list)
    probed: list[float] = field(default_factory=list)

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return self.offered - len(self.results)

    def latency(self) -> float | None:
        """Median latency of the answers so far, s; None before the first."""
        return percentile(sorted(r.seconds for r in self.results if r.kind == OK), 0.5)

    def expected_latency(self) -> float:
        """Median latency of the answers so far, s; before the first, of the probes; 1 without either."""
        found = self.latency() or percentile(sorted(self.probed), 0.5)
        return max(0.01, found or 1.0)

    def summary(self, offered_s: float) -> dict[str, Any]:
        """Figures of a load that was offered for ``offered_s`` s, as a whole and by phase.

        Times are in s. ``offered_per_s`` is over ``offered_seconds``, in which requests were due;
        ``completed_per_s`` and ``output_tokens_per_s`` are over ``seconds``, which ends with the last answer
        and is at least as long. A phase begins with its first request (the first phase, with the load) and is
        offered until the next phase begins.
        """
        whole = _summary(self.results, self.offered, 0.0, offered_s)
        by_phase: dict[str, list[RequestResult]] = {}
        for result in sorted(self.results, key=lambda result: result.at):
            by_phase.setdefault(result.phase, []).append(result)
        if len(by_phase) > 1:
            bounds = [0.0, *(found[0].at for found in list(by_phase.values())[1:]), offered_s]
            whole["phases"] = {
                name: _summary(found, len(found), begin, end)
                for (name, found), (begin, end) in zip(by_phase.items(), pairwise(bounds), strict=True)
            }
        return whole


def _summary(results: Sequence[RequestResult], offered: int, begin: float, end: float) -> dict[str, Any]:
    """Figures of the requests offered from ``begin`` to ``end``, s from the start of the load."""
    good = [r for r in results if r.kind == OK]
    prompt = sum(r.prompt_tokens for r in good)
    errors = Counter(r.kind for r in results if r.kind != OK)
    first = [r.first_token for r in good if r.first_token is not None]
    offered_s = end - begin
    seconds = max([end, *(r.at + r.seconds for r in results)]) - begin
    output = sum(r.output_tokens for r in good)
    return {
        "seconds": round(seconds, 3),
        "offered_seconds": round(offered_s, 3),
        "offered": offered,
        "completed": len(good),
        "offered_per_s": round(_rate(offered, offered_s), 3),
        "completed_per_s": round(_rate(len(good), seconds), 3),
        "latency_s": quantiles(r.seconds for r in good),
        "first_token_s": quantiles(first) if first else None,
        "hit_rate": sum(r.cached_tokens for r in good) / prompt if prompt else None,
        "tokens": {
            "prompt": prompt,
            "cached": sum(r.cached_tokens for r in good),
            "output": output,
            "prompt_mean": prompt / len(good) if good else None,
            "output_mean": output / len(good) if good else None,
        },
        "output_tokens_per_s": round(_rate(output, seconds), 1),
        "errors": dict(errors),
        "error_examples": {
            kind: next(r.message for r in results if r.kind == kind) for kind in sorted(errors)
        },
        "latest_send_s": max((r.late for r in results), default=0.0),
    }


def _rate(count: int, seconds: float) -> float:
    """Events per s; 0 if no time has passed."""
    return count / seconds if seconds > 0 else 0.0


def format_summary(summary: dict[str, Any]) -> list[str]:
    """The summary as text, one line for each figure."""
    latency, first, tokens = summary["latency_s"], summary["first_token_s"], summary["tokens"]
    lines = [
        f"requests    {summary['offered']} offered in {summary['offered_seconds']:.0f} s "
        f"({summary['offered_per_s']:.2f}/s), {summary['completed']} completed in "
        f"{summary['seconds']:.0f} s ({summary['completed_per_s']:.2f}/s)",
        f"latency     {_times(latency)}",
    ]
    if first:
        lines.append(f"first token {_times(first)}")
    if summary["completed"]:
        rate = summary["hit_rate"]
        lines += [
            f"hit rate    {'not reported' if rate is None else f'{rate:.1%}'} of prompt tokens",
            f"tokens      {tokens['prompt_mean']:.0f} in and {tokens['output_mean']:.0f} out per request, "
            f"{summary['output_tokens_per_s']:.0f} out/s",
        ]
    for kind, count in summary["errors"].items():
        lines.append(
            f"errors      {count} {kind} ({ERROR_KINDS[kind]}): {summary['error_examples'][kind][:160]}"
        )
    if not summary["errors"]:
        lines.append("errors      none")
    if summary["latest_send_s"] > 0.1:
        lines.append(
            f"note        the generator sent requests up to {summary['latest_send_s']:.2f} s late; "
            "latencies include this delay"
        )
    return lines


def _times(values: dict[str, float | None]) -> str:
    return "  ".join(
        f"{name} {'-' if value is None else f'{value * 1000:.0f} ms'}"
        for name, value in values.items()
        if name != "mean"
    )
