"""Time to the first streamed token over HTTP after a cache hit and after a miss, in interleaved pairs.

A hit shares 1,024 tokens with earlier requests and has 16 new ones; a miss has 1,040 new ones. Without a URL
the benchmark starts an engine on a free port.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench import command, results
from bench.command import CannotRunError
from bench.server import served

SHARED_TOKENS, NEW_TOKENS = 1024, 16
TARGET_RATIO = 8.0
CONFIG: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "maxTokens": 16384,
    "maxStepTokens": 2048,
    "batchSize": 4,
    "numWorkers": 4,
    "cacheStrategy": "lru",
}


def text(generator: random.Random, length: int) -> str:
    """Random printable characters, one token each for a built-in model."""
    return "".join(chr(generator.randint(0x20, 0x7E)) for _ in range(length))


def first_token_s(connection: http.client.HTTPConnection, prompt: str) -> tuple[float, int]:
    """Seconds from sending the request to the first token, and the number of cached tokens in the usage."""
    body = json.dumps(
        {
            "model": "builtin/tiny-llama",
            "prompt": prompt,
            "max_tokens": 2,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    first, cached = None, 0
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise CannotRunError(f"HTTP {response.status}: {response.read()[:300]!r}")
    for raw in response:
        line = raw.decode().strip()
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk = json.loads(line.removeprefix("data: "))
        if first is None and any(choice.get("text") for choice in chunk["choices"]):
            first = time.perf_counter() - began
        if usage := chunk.get("usage"):
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    if first is None:
        raise CannotRunError("the stream ended without a token")
    return first, cached


def measure(url: str, pairs: int, seed: int) -> dict[str, Any]:
    """Measure interleaved pairs after three pairs of warm-up; times in ms."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=60)
    generator = random.Random(seed)
    shared = text(generator, SHARED_TOKENS)
    hits, misses = [], []
    for pair in range(-3, pairs):
        hit, cached_hit = first_token_s(connection, shared + text(generator, NEW_TOKENS))
        miss, cached_miss = first_token_s(connection, text(generator, SHARED_TOKENS + NEW_TOKENS))
        if pair >= 0:
            assert cached_hit == SHARED_TOKENS, f"{cached_hit} tokens cached on a hit"
            assert cached_miss == 0, f"{cached_miss} tokens cached on a miss"
            hits.append(hit)
            misses.append(miss)
    connection.close()
    hit, miss = statistics.median(hits), statistics.median(misses)
    return {
        "pairs": pairs,
        "hit_p50_ms": round(1000 * hit, 2),
        "miss_p50_ms": round(1000 * miss, 2),
        "hit_p95_ms": round(1000 * statistics.quantiles(hits, n=20)[-1], 2),
        "miss_p95_ms": round(1000 * statistics.quantiles(misses, n=20)[-1], 2),
        "ratio_p50": round(miss / hit, 2),
    }


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 if the median hit is at least 8 times as fast as the median miss, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of a running server; default: start one")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--output", type=Path, default=results.DIRECTORY)
    options = parser.parse_args(argv)
    with served(options.url, CONFIG) as url:
        figures = measure(url, options.pairs, options.seed)
    print(
        results.write(
            "first_token", "First token after a hit and a miss", figures, options.output
        ).read_text()
    )
    if figures["ratio_p50"] < TARGET_RATIO:
        print(f"first_token: FAILED: {figures['ratio_p50']} times as fast, {TARGET_RATIO:g} wanted")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(command.run("first_token", main))
