"""Long-lived processes owned by process id: start, stop, wait for them, and show why one failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.cluster.console import ClusterError

POLL_SECONDS = 0.1
LOG_LINES = 15


@dataclass(frozen=True)
class Record:
    """A started process. `born` (clock ticks since boot) tells it from a later one with the same id."""

    name: str
    argv: tuple[str, ...]
    pid: int
    born: int


def born(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot; None when there is none, or only a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


class Processes:
    """The processes whose records are in one directory."""

    def __init__(self, records: Path, logs: Path) -> None:
        self._records = records
        self._logs = logs

    def log(self, name: str) -> Path:
        """The file that a process writes its output to."""
        return self._logs / f"{name}.log"

    def record(self, name: str) -> Record | None:
        """What was started under this name, running or not."""
        try:
            data = json.loads((self._records / f"{name}.json").read_text())
        except FileNotFoundError:
            return None
        return Record(data["name"], tuple(data["argv"]), data["pid"], data["born"])

    def names(self) -> list[str]:
        """Every name ever started here, oldest first."""
        files = sorted(self._records.glob("*.json"), key=lambda p: p.stat().st_mtime)
        return [file.stem for file in files]

    def running(self, name: str) -> bool:
        """Whether the process started under this name still lives."""
        record = self.record(name)
        return record is not None and born(record.pid) == record.born

    def start(self, name: str, argv: Sequence[str]) -> Record:
        """Start a process in a session of its own, so that it outlives this command."""
        if self.running(name):
            raise ClusterError(f"{name} is running already")
        self._records.mkdir(parents=True, exist_ok=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("wb") as log:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
                env=without_proxies(os.environ),
            )
        record = Record(name, tuple(argv), process.pid, born(process.pid) or 0)
        (self._records / f"{name}.json").write_text(json.dumps(asdict(record)))
        return record

    def restart(self, name: str) -> Record:
        """Start again, with the same arguments, what was stopped."""
        record = self.require(name)
        return record if self.running(name) else self.start(name, record.argv)

    def require(self, name: str) -> Record:
        """What was started under this name.

        Raises:
            ClusterError: nothing was; names what was.
        """
        if record := self.record(name):
            return record
        raise ClusterError(
            f"process {name!r} is unknown, allowed: {', '.join(self.names()) or 'none, it is down'}"
        )

    def stop(self, name: str, grace_s: float = 10.0) -> None:
        """End a process by SIGTERM, by SIGKILL after `grace_s`; nothing happens when it does not run."""
        self.stop_many([name], grace_s)

    def stop_many(self, names: Sequence[str], grace_s: float = 10.0) -> None:
        """End several at once: each gets `grace_s` after SIGTERM, all in parallel."""
        records = [r for r in map(self.record, names) if r is not None and born(r.pid) == r.born]
        for record in records:
            end(record.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while (records := [r for r in records if born(r.pid) == r.born]) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 5)
        for record in records:
            end(record.pid, signal.SIGKILL)
        while any(born(r.pid) == r.born for r in records):
            if time.monotonic() > deadline + 10:
                raise ClusterError(f"{[r.name for r in records]} did not end 10 s after SIGKILL")
            time.sleep(POLL_SECONDS / 5)

    def wait(self, what: str, ready: Callable[[], bool], timeout_s: float, name: str) -> None:
        """Poll `ready` until it holds.

        Raises:
            ClusterError: `name` ended meanwhile, or the time is over; with the last lines of its log.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            if not self.running(name):
                raise ClusterError(f"{name} ended before {what}; {self.log_tail(name)}")
            if time.monotonic() > deadline:
                raise ClusterError(f"{what}: not after {timeout_s:.0f} s; {self.log_tail(name)}")
            time.sleep(POLL_SECONDS)

    def log_tail(self, name: str) -> str:
        """Where the log is, and its last lines."""
        log = self.log(name)
        if not log.exists():
            return f"no log at {log}"
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8_192))
            lines = file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
        return f"last lines of {log}:\n" + "\n".join(f"  {line[:300]}" for line in lines)


def without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without proxy settings: all that the cluster talks to is on this machine."""
    return {name: value for name, value in environment.items() if not name.lower().endswith("_proxy")}


def end(pid: int, with_signal: signal.Signals) -> None:
    """Signal a process that may be gone already."""
    try:
        os.kill(pid, with_signal)
    except ProcessLookupError:
        return


def run(command: Sequence[str | Path], timeout_s: float = 60.0, stdin: str | None = None) -> str:
    """Run a short command and return its output.

    Raises:
        ClusterError: it failed or took longer than `timeout_s`.
    """
    argv = [str(part) for part in command]
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, text=True, check=False, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"`{' '.join(argv)}` took more than {timeout_s:.0f} s") from error
    except FileNotFoundError as error:
        raise ClusterError(f"{argv[0]} is not installed") from error
    if done.returncode:
        raise ClusterError(
            f"`{' '.join(argv)}` failed ({done.returncode}): {(done.stderr or done.stdout).strip()}"
        )
    return done.stdout
