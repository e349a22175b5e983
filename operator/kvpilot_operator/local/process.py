"""An engine as a child process."""

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


EXIT_GRACE_S = 5.0
"""Time that an engine may take to exit after its drain time, s."""


@dataclass(frozen=True)
class Launch:
    """How to start an engine; ``environment`` is added to the environment of this process."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    log: Path


def _die_with(parent: int) -> Callable[[], None]:
    """Preparation of the child: the kernel kills it when its parent ends for any reason."""

    def arm() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before the signal was armed
            os._exit(1)

    return arm


class EngineProcess:
    """A running engine; it chooses its ports and prints them on its first line."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self._ports: asyncio.Future[tuple[int, int] | None] = asyncio.get_running_loop().create_future()
        self._listening = asyncio.create_task(self._listen())
        self.last_line = ""

    @classmethod
    async def start(cls, launch: Launch) -> EngineProcess:
        """Start an engine in its own session, so that Ctrl-C signals only this process."""
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
        """Main and admin port; None if the engine ended before it listened."""
        return await asyncio.shield(self._ports)

    async def wait(self) -> int:
        """Exit status, after the engine ended and all its output is in the log."""
        status = await self._process.wait()
        await self._listening
        return status

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the engine has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def end(self, seconds: float) -> None:
        """Let the engine finish its requests; kill it after ``seconds``."""
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            self.signal(signal.SIGKILL)
        await self.wait()

    async def end_now(self) -> None:
        """End the engine without its requests: a second SIGTERM makes it exit at once."""
        for _ in range(2):
            self.signal(signal.SIGTERM)
            await asyncio.sleep(0.1)  # signals that arrive together count once
        await self.end(EXIT_GRACE_S)

    async def _listen(self) -> None:
        """Copy the output of the engine to its log, and read its ports from it."""
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
    """True if ``/readyz`` answers 200 within 2 s."""
    try:
        async with session.get(f"{url}/readyz", timeout=aiohttp.ClientTimeout(total=2)) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False
