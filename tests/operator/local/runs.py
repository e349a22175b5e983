"""``kvpilot up`` as a process, as a user starts it."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path


class Up:
    """A running ``kvpilot up`` and its output."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def until(self, pattern: str, seconds: float = 180) -> re.Match[str]:
        """The first match in the output from now on."""
        assert self.process.stdout is not None
        async with asyncio.timeout(seconds):
            async for line in self.process.stdout:
                self.lines.append(line.decode().rstrip())
                if found := re.search(pattern, self.lines[-1]):
                    return found
        raise AssertionError(f"it ended without a line that matches {pattern!r}: {self.lines}")

    async def ended(self, seconds: float = 180) -> int:
        """Its exit code."""
        assert self.process.stdout is not None
        async with asyncio.timeout(seconds):
            async for line in self.process.stdout:
                self.lines.append(line.decode().rstrip())
            return await self.process.wait()


@asynccontextmanager
async def up(directory: Path, *arguments: str) -> AsyncIterator[Up]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from kvpilot_operator.cli import app; app()",
        "up",
        *arguments,
        cwd=directory,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield Up(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
