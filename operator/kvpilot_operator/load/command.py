"""What ``kvpilot load`` does once its options are read."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Collection, Iterable, Mapping
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

TRACE_OPTIONS = ("speed", "shrink")
CHAT_OPTIONS = (
    *("rate", "seed", "think", "turns"),
    *("system_prompts", "system_tokens", "user_tokens", "output_tokens"),
)
"""Fields that only a trace and only chats have a use for."""


@dataclass(frozen=True)
class LoadOptions:
    """The command line. ``given``: the fields that it gives itself."""

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
    """Send the load and print its figures; returns the exit code (2 for bad input, 1 for no server)."""
    try:
        workload = workload_of(options)
        client = Client(options.url, stream=options.stream, timeout_s=options.timeout)
        check_files({"--trace": options.trace}, {"--json": options.json_out})
    except LoadError as error:
        print(f"kvpilot load: {error}", file=sys.stderr)
        return 2
    summary = asyncio.run(_run(client, workload))
    if summary is None:
        return 1
    print("\n".join(lines_of(summary)))
    if options.json_out is not None:
        text = json.dumps(summary, indent=1) + "\n"
        if not write_file("kvpilot load", options.json_out, text):
            return 1
        print(f"figures     {options.json_out}")
    return 0


def check_files(read: Mapping[str, Path | None], written: Mapping[str, Path | None]) -> None:
    """Refuse files, by their options, that could not be written in the end or would be written over another.

    Raises:
        LoadError: a directory does not exist, a file is a directory, cannot be written, or is read or written
            by another option.
    """
    used = {path.resolve(): option for option, path in read.items() if path is not None}
    for option, path in written.items():
        if path is None:
            continue
        if path.is_dir() or not path.parent.is_dir():
            raise LoadError(f"{option}: must be a file in a directory that exists, got {path}")
        if (other := used.setdefault(path.resolve(), option)) != option:
            raise LoadError(f"{option}: must be another file than that of {other}, got {path}")
        try:
            _try_to_write(path)
        except OSError as error:
            raise LoadError(f"{option}: cannot be written: {error.strerror}, got {path}") from error


def _try_to_write(path: Path) -> None:
    there = path.exists()
    if there and not path.is_file():
        return  # the reader of a pipe would see its end
    with path.open("a"):
        pass
    if not there:
        path.unlink()


def write_file(program: str, path: Path, text: str) -> bool:
    """Write an output file; where that fails at the end of a run, one line says so, and False is returned."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"{program}: {path}: cannot be written: {error.strerror}", file=sys.stderr)
        return False
    return True


def check_unused(given: Collection[str], unused: Iterable[str], why: str) -> None:
    """Refuse options, by their names in Python, that are given and would change nothing.

    Raises:
        LoadError: naming the first one and ``why``.
    """
    for name in unused:
        if name in given:
            raise LoadError(f"--{name.replace('_', '-')}: {why}")


def workload_of(options: LoadOptions) -> Workload:
    """The trace where one is given, chats otherwise.

    Raises:
        LoadError: for an option or a trace that cannot be used.
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
