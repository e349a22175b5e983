"""Hit rate of a recorded trace on the real engine, compared with a simulation of the same LRU cache.

The engine serves the trace at its recorded arrival times with the lru policy and no host tier. The simulation
replays the engine's lookups and insertions. Both count whole pages, including pages of outputs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import command, results
from bench.command import CannotRunError
from kvpilot_engine.contract import PAGE_TOKENS, KVCacheConfig
from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.config import QUIET
from kvpilot_engine.contract.metrics import total
from kvpilot_engine.core.engine import Engine
from kvpilot_engine.frontend.tokenizer import load_tokenizer
from kvpilot_engine.ipc import messages
from kvpilot_operator.load.trace import TraceRequest, prompt_of, read_trace

TRACE = "mooncake_conversation_first_half.jsonl"


@dataclass
class Simulation:
    """An LRU cache of whole pages. A lookup counts the leading pages in the cache and marks them as used."""

    pages: int
    hits: int = 0
    _held: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def feed(self, event: str, subject: Any, _: int = 0) -> None:
        """Apply one lookup or insertion that the engine reports."""
        if event == "insert":
            self._held[subject] = None
            self._held.move_to_end(subject)
            while len(self._held) > self.pages:
                self._held.popitem(last=False)
            return
        found = 0
        while found < len(subject) and subject[found] in self._held:
            found += 1
        # The last page becomes the oldest, because it is useless without the pages before it.
        for page in reversed(subject[:found]):
            self._held.move_to_end(page)
        self.hits += found


def find_trace(given: str | None) -> Path:
    """Path of the given trace, else of ``TRACE`` in the directory of the variable KVPILOT_TRACES.

    Raises:
        CannotRunError: there is no such file.
    """
    directory = os.environ.get("KVPILOT_TRACES")
    if given is None and directory is None:
        raise CannotRunError(
            f"no trace: give --trace FILE, or set KVPILOT_TRACES to the directory of {TRACE}"
        )
    path = Path(given) if given is not None else Path(directory or "") / TRACE
    if not path.is_file():
        raise CannotRunError(f"no trace: there is no file {path}")
    return path


def serve(
    engine: Engine, requests: list[TraceRequest], speed: float, shrink: int, paced: bool
) -> dict[str, int]:
    """Serve the trace; the number of requests by finish reason."""
    encode = load_tokenizer("builtin/tiny-llama").encode
    began = time.monotonic()
    reasons: dict[str, int] = {}
    at = 0
    while at < len(requests) or engine.has_work:
        now = time.monotonic() - began
        while at < len(requests) and (not paced or requests[at].at / speed <= now):
            request = requests[at]
            engine.submit(
                messages.Generate(
                    id=str(at),
                    prompt=encode(prompt_of(request, shrink, str(at))),
                    max_new_tokens=max(1, -(-request.output_tokens // shrink)),
                    timeout_s=3600.0,
                )
            )
            at += 1
        if not engine.has_work:
            time.sleep(max(0.0, requests[at].at / speed - now))
            continue
        for message in engine.step():
            if isinstance(message, messages.Finished):
                reasons[message.reason] = reasons.get(message.reason, 0) + 1
    return reasons


def measure(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Serve the trace and compare the hit rates; all figures by name."""
    minutes = options.minutes * 60
    requests = [r for r in read_trace(path) if r.at < minutes]
    config = KVCacheConfig.model_validate(
        {
            "max_tokens": options.pages * PAGE_TOKENS,
            "cache_strategy": "lru",
            "host_memory_mb": 0,
            "dtype": "float32",
            "device": "cpu",
            "num_workers": options.workers,
            "batch_size": options.rows,
            "max_step_tokens": 1024,
        },
        context=QUIET,
    )
    simulation = Simulation(options.pages)
    engine = Engine(config, options.model, on_cache=simulation.feed)
    began = time.monotonic()
    reasons = serve(engine, requests, options.speed, options.shrink, not options.unpaced)
    seconds = time.monotonic() - began
    engine.check_integrity()
    counters = engine.sample("").counters
    engine.close()
    queried = total(counters, names.QUERY_TOKENS_TOTAL)
    measured = 100 * counters[names.HIT_TOKENS_TOTAL]["pool"] / queried
    simulated = 100 * simulation.hits * PAGE_TOKENS / queried
    return {
        "trace": path.name,
        "model": Path(options.model).name,
        "trace_minutes": options.minutes,
        "speed": "unpaced" if options.unpaced else options.speed,
        "shrink": options.shrink,
        "pages": options.pages,
        "requests": len(requests),
        "ended": reasons,
        "prompt_tokens": int(queried),
        "evicted_pages": int(total(counters, names.EVICTED_PAGES_TOTAL)),
        "preemptions": int(total(counters, names.PREEMPTIONS_TOTAL)),
        "hit_rate_percent": round(measured, 3),
        "simulated_percent": round(simulated, 3),
        "difference_points": round(measured - simulated, 3),
        "ceiling_percent": round(100 * counters[names.CEILING_TOKENS_TOTAL] / queried, 3),
        "busy_share": round(counters[names.STEP_BUSY_SECONDS_TOTAL] / seconds, 3),
        "seconds": round(seconds, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 if no request failed and the two rates differ by at most one point, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", help=f"a Mooncake trace; default: {TRACE} in the directory KVPILOT_TRACES")
    parser.add_argument("--model", default="builtin/tiny-llama", help="the rate does not depend on it")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the trace")
    parser.add_argument("--speed", type=float, default=5.0)
    parser.add_argument("--shrink", type=int, default=32)
    parser.add_argument("--pages", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--unpaced", action="store_true", help="send everything at once")
    parser.add_argument("--output", type=Path, default=results.DIRECTORY)
    options = parser.parse_args(argv)
    path = find_trace(options.trace)
    torch.set_num_threads(1)
    figures = measure(options, path)
    written = results.write(
        "trace_hit_rate", "Hit rate of a trace against a simulation", figures, options.output
    )
    print(written.read_text())
    failed = {reason: n for reason, n in figures["ended"].items() if reason not in {"length", "stop"}}
    if failed or abs(figures["difference_points"]) > 1.0:
        print(
            f"trace_hit_rate: FAILED: requests ended {figures['ended']}, "
            f"the rates differ by {figures['difference_points']} points"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(command.run("trace_hit_rate", main))
