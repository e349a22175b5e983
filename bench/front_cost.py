"""CPU time of the front process per request and per streamed token, compared with the core process.

A closed loop of keep-alive connections sends short prompts to a real engine. CPU time comes from the
scheduler's accounting (/proc/PID/task/*/schedstat); on a busy machine only cold caches increase it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from bench import command, results
from bench.command import CannotRunError
from bench.first_token import CONFIG
from bench.server import served

PROMPT = "A prompt of four pages, which every request of this benchmark has."


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of all threads of a process since its start."""
    files = (Path(f"/proc/{process.pid}/task/{thread.id}/schedstat") for thread in process.threads())
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


class Load:
    """A closed loop of keep-alive connections."""

    def __init__(self, port: int, requests: int, tokens: int, stream: bool) -> None:
        self._port = port
        self._left = requests
        self.chunks = 0
        fields = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": stream}
        body = json.dumps(fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body

    async def connection(self) -> None:
        """Send one request after another until none is left.

        Raises:
            CannotRunError: an answer is not HTTP 200.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        while self._left > 0:
            self._left -= 1
            writer.write(self._request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b" 200 " not in head.split(b"\r\n")[0]:
                raise CannotRunError(head.decode())
            if b"transfer-encoding: chunked" in head:
                await self._chunked(reader)
            else:
                await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        writer.close()
        await writer.wait_closed()

    async def _chunked(self, reader: asyncio.StreamReader) -> None:
        while size := int(await reader.readline(), 16):
            self.chunks += 1
            await reader.readexactly(size + 2)
        await reader.readline()


async def measure(port: int, connections: int, requests: int, tokens: int, stream: bool) -> dict[str, Any]:
    """Rates and CPU time by process of one run."""
    front = next(c for c in psutil.Process().children() if f"{port}" in c.cmdline())
    core = front.children()[0]
    load = Load(port, requests, tokens, stream)
    before = cpu_s(front), cpu_s(core)
    began = time.perf_counter()
    await asyncio.gather(*(load.connection() for _ in range(connections)))
    took = time.perf_counter() - began
    front_s, core_s = cpu_s(front) - before[0], cpu_s(core) - before[1]
    return {
        "requests_per_s": round(requests / took, 1),
        "tokens_per_s": round(requests * tokens / took),
        "front_cpu_ms_per_request": round(1000 * front_s / requests, 3),
        "front_cpu_us_per_token": round(1e6 * front_s / requests / tokens, 1),
        "core_cpu_ms_per_request": round(1000 * core_s / requests, 2),
        "front_share_of_cpu": round(front_s / (front_s + core_s), 3),
        "tokens_per_event": round(requests * tokens / load.chunks, 2) if load.chunks else None,
    }


def main(argv: list[str] | None = None) -> int:
    """Write the figures; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--output", type=Path, default=results.DIRECTORY)
    options = parser.parse_args(argv)
    figures: dict[str, Any] = {"requests": options.requests, "connections": options.connections}
    with served(None, CONFIG) as url:
        port = urlsplit(url).port or 0
        for name, tokens, stream in (
            ("one_token", 1, False),
            ("whole_32", 32, False),
            ("stream_32", 32, True),
        ):
            run = asyncio.run(measure(port, options.connections, options.requests, tokens, stream))
            figures |= {f"{name}_{key}": value for key, value in run.items() if value is not None}
    print(results.write("front_cost", "What the front process costs", figures, options.output).read_text())
    return 0


if __name__ == "__main__":
    sys.exit(command.run("front_cost", main))
