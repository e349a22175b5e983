"""What ``kvpilot load`` does once its options are read."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from kvpilot_operator.load.chat import ChatShape, ChatWorkload
from kvpilot_operator.load.client import Client, RequestError
from kvpilot_operator.load.results import OK, lines_of
from kvpilot_operator.load.runner import LoadRun
from kvpilot_operator.load.trace import TraceWorkload
from kvpilot_operator.load.workload import LoadError, Phase, Workload

CHAT_SECONDS = 60.0
"""How long a chat load sends unless told."""


@dataclass(frozen=True)
class LoadOptions:
    """The command line, as given."""

    url: str
    rate: float
    duration: float | None
    seed: int
    turns: int
    system_prompts: int
    system_tokens: int
    user_tokens: int
    output_tokens: int
    think: float
    trace: Path | None
    speed: float
    shrink: int
    stream: bool
    timeout: float
    json_out: Path | None


def run_load(options: LoadOptions) -> int:
    """Send the load and print its figures; returns the exit code (2 for bad input, 1 for no server)."""
    try:
        workload = workload_of(options)
        client = Client(options.url, stream=options.stream, timeout_s=options.timeout)
        check_writable("--json", options.json_out)
    except LoadError as error:
        print(f"kvpilot load: {error}", file=sys.stderr)
        return 2
    summary = asyncio.run(_run(client, workload))
    if summary is None:
        return 1
    print("\n".join(lines_of(summary)))
    if options.json_out is not None:
        options.json_out.write_text(json.dumps(summary, indent=1) + "\n")
        print(f"figures     {options.json_out}")
    return 0


def check_writable(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written in the end.

    Raises:
        LoadError: its directory does not exist, or it is a directory itself.
    """
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise LoadError(f"{option}: must be a file in a directory that exists, got {path}")


def workload_of(options: LoadOptions) -> Workload:
    """The trace where one is given, chats otherwise.

    Raises:
        LoadError: for an option or a trace that cannot be used.
    """
    if options.trace is not None:
        return TraceWorkload(
            options.trace, speed=options.speed, shrink=options.shrink, seconds=options.duration
        )
    shape = ChatShape(
        system_prompts=options.system_prompts,
        system_tokens=options.system_tokens,
        turns=options.turns,
        user_tokens=options.user_tokens,
        output_tokens=options.output_tokens,
        think_s=options.think,
    )
    seconds = CHAT_SECONDS if options.duration is None else options.duration
    return ChatWorkload([Phase("chat", seconds, rate=options.rate)], shape, options.seed)


async def _run(client: Client, workload: Workload) -> dict[str, object] | None:
    async with client:
        try:
            model = await client.find_model()
        except RequestError as error:
            print(f"kvpilot load: {error}", file=sys.stderr)
            return None
        print(f"{workload.title}; model {model}; {workload.seconds:.0f} s", flush=True)
        run = LoadRun(client, workload)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, run.stop)
        progress = asyncio.create_task(_progress(run, workload.seconds))
        try:
            await run.run()
        finally:
            progress.cancel()
            if sys.stderr.isatty():
                print(file=sys.stderr)
    return run.summary()


async def _progress(run: LoadRun, seconds: float) -> None:
    """One line that is rewritten in a terminal; a line each 10 s otherwise."""
    terminal = sys.stderr.isatty()
    while True:
        await asyncio.sleep(1 if terminal else 10)
        tally = run.tally
        good = sum(1 for result in tally.results if result.kind == OK)
        latency = tally.latency()
        line = (
            f"{run.seconds:4.0f}/{seconds:.0f} s  offered {tally.offered}  completed {good}  "
            f"failed {len(tally.results) - good}  in flight {tally.in_flight}  "
            f"p50 {'-' if latency is None else f'{latency * 1000:.0f} ms'}"
        )
        print(f"\r{line}" if terminal else line, end="   " if terminal else "\n", file=sys.stderr, flush=True)
