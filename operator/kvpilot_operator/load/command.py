"""Runs ``kvpilot load``: checks the options, sends the load and prints the figures."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from kvpilot_operator.load.chat import ChatShape, ChatWorkload
from kvpilot_operator.load.client import Client, RequestError
from kvpilot_operator.load.results import OK, format_summary
from kvpilot_operator.load.runner import LoadRun
from kvpilot_operator.load.trace import TraceWorkload
from kvpilot_operator.load.workload import LoadError, LoadPhase, Workload
from kvpilot_operator.options import TRACE_OPTIONS, OptionError, check_files, check_unused, write_file

CHAT_SECONDS = 60.0
"""Duration of a chat load without ``--duration``, s."""

CHAT_OPTIONS = (
    *("rate", "seed", "think", "turns"),
    *("system_prompts", "system_tokens", "user_tokens", "output_tokens"),
)
"""Options that only chats use, by their names in Python."""


@dataclass(frozen=True)
class LoadOptions:
    """Options of the command line; ``given`` names those that are not defaults."""

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
    given: frozenset[str] = frozenset()


def run_load(options: LoadOptions) -> int:
    """Send the load and print its figures; the exit code is 2 for invalid input, 1 if no server answers."""
    try:
        workload = workload_of(options)
        client = Client(options.url, stream=options.stream, timeout_s=options.timeout)
        check_files({"--trace": options.trace}, {"--json": options.json_out})
    except (LoadError, OptionError) as error:
        print(f"kvpilot load: {error}", file=sys.stderr)
        return 2
    summary = asyncio.run(_run(client, workload))
    if summary is None:
        return 1
    print("\n".join(format_summary(summary)))
    if options.json_out is not None:
        text = json.dumps(summary, indent=1) + "\n"
        if not write_file("kvpilot load", options.json_out, text):
            return 1
        print(f"figures     {options.json_out}")
    return 0


def workload_of(options: LoadOptions) -> Workload:
    """The trace if one is given, otherwise chats.

    Raises:
        LoadError, OptionError: an option or the trace is invalid.
    """
    if options.trace is not None:
        check_unused(options.given, CHAT_OPTIONS, "cannot go with --trace")
        return TraceWorkload(
            options.trace, speed=options.speed, shrink=options.shrink, seconds=options.duration
        )
    check_unused(options.given, TRACE_OPTIONS, "needs --trace FILE")
    shape = ChatShape(
        system_prompts=options.system_prompts,
        system_tokens=options.system_tokens,
        turns=options.turns,
        user_tokens=options.user_tokens,
        output_tokens=options.output_tokens,
        think_s=options.think,
    )
    seconds = CHAT_SECONDS if options.duration is None else options.duration
    return ChatWorkload([LoadPhase("chat", seconds, rate=options.rate)], shape, options.seed)


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
    """Print progress: in a terminal one line that is rewritten, otherwise a line every 10 s."""
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
