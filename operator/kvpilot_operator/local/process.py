"""One engine as a child process: started, heard, asked whether it is ready, drained, ended."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

_PR_SET_PDEATHSIG = 1
_LISTENING = re.compile(r"listening on port (\d+), admin port (\d+)")
_libc = ctypes.CDLL(None, use_errno=True)


LATE_S = 5.0
"""Beyond its drain time, how long an engine may take to end, s."""


@dataclass(frozen=True)
class Launch:
    """How an engine is started. ``environment`` is added to this process's own."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    log: Path


def _die_with(parent: int) -> Callable[[], None]:
    """To run in the child before its program: the kernel kills it once its parent is gone, for any reason."""

    def arm() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the signal was armed
            os._exit(1)

    return arm


class EngineProcess:
    """A running engine. It chooses its own ports and says them on its first line."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self._ports: asyncio.Future[tuple[int, int] | None] = asyncio.get_running_loop().create_future()
        self._listening = asyncio.create_task(self._listen())
        self.last_line = ""

    @classmethod
    async def start(cls, launch: Launch) -> EngineProcess:
        """Start an engine. It has a session of its own, so that Ctrl-C reaches this process alone."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "kvpilot_engine",
            *launch.arguments,
            *("--host", "127.0.0.1", "--port", "0", "--admin-port", "0"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **launch.environment},
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),
        )
        return cls(process, launch.log)

    async def ports(self) -> tuple[int, int] | None:
        """Main and admin port; None when the engine ended before it had any."""
        return await asyncio.shield(self._ports)

    async def wait(self) -> int:
        """Its exit status, once it has ended and everything it said is in the log."""
        status = await self._process.wait()
        await self._listening
        return status

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def end(self, seconds: float) -> None:
        """Tell it to finish its requests, and kill it after so many seconds."""
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            self.signal(signal.SIGKILL)
        await self.wait()

    async def hurry(self) -> None:
        """End it at once: an engine that is told twice does not wait for its requests."""
        for _ in range(2):
            self.signal(signal.SIGTERM)
            await asyncio.sleep(0.1)  # two signals that arrive together are one
        await self.end(LATE_S)

    async def _listen(self) -> None:
        """Copy what the engine says to its log, and catch its ports."""
        assert self._process.stderr is not None
        with self._log.open("ab") as log:
            async for line in self._process.stderr:
                log.write(line)
                log.flush()
                self.last_line = line.decode(errors="replace").strip() or self.last_line
                if not self._ports.done() and (found := _LISTENING.search(self.last_line)):
                    self._ports.set_result((int(found[1]), int(found[2])))
        if not self._ports.done():
            self._ports.set_result(None)


async def is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    """Whether ``/readyz`` says yes within 2 s."""
    try:
        async with session.get(f"{url}/readyz", timeout=aiohttp.ClientTimeout(total=2)) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False
