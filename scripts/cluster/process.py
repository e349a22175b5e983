"""Long-lived processes identified by process id and start time: start, stop, wait, show the log."""

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
    """A started process; its id and `born` (clock ticks since boot) together are unique."""

    name: str
    argv: tuple[str, ...]
    pid: int
    born: int


def born(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot; None if it has ended or is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


class Processes:
    """The processes recorded in one directory."""

    def __init__(self, records: Path, logs: Path) -> None:
        self._records = records
        self._logs = logs

    def log(self, name: str) -> Path:
        """The file with the output of a process."""
        return self._logs / f"{name}.log"

    def record(self, name: str) -> Record | None:
        """The record of a process, running or not; None if the name is unknown."""
        try:
            data = json.loads((self._records / f"{name}.json").read_text())
        except FileNotFoundError:
            return None
        return Record(data["name"], tuple(data["argv"]), data["pid"], data["born"])

    def names(self) -> list[str]:
        """All recorded names, oldest first."""
        files = sorted(self._records.glob("*.json"), key=lambda p: p.stat().st_mtime)
        return [file.stem for file in files]

    def running(self, name: str) -> bool:
        """True if the process with this name is alive."""
        record = self.record(name)
        return record is not None and born(record.pid) == record.born

    def start(self, name: str, argv: Sequence[str]) -> Record:
        """Start a process in its own session, so that it survives this command."""
        if self.running(name):
            raise ClusterError(f"{name} is already running")
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
        """Start a stopped process again with the same arguments."""
        record = self.require(name)
        return record if self.running(name) else self.start(name, record.argv)

    def require(self, name: str) -> Record:
        """The record of a process.

        Raises:
            ClusterError: the name is unknown; the message lists the known names.
        """
        if record := self.record(name):
            return record
        raise ClusterError(
            f"process {name!r} is unknown, allowed: {', '.join(self.names()) or 'none, the cluster is down'}"
        )

    def stop(self, name: str, grace_s: float = 10.0) -> None:
        """End a process with SIGTERM, and with SIGKILL after `grace_s`; no error if it does not run."""
        self.stop_many([name], grace_s)

    def stop_many(self, names: Sequence[str], grace_s: float = 10.0) -> None:
        """End several processes in parallel, each with `grace_s` between SIGTERM and SIGKILL."""
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
        """Poll `ready` until it returns true.

        Raises:
            ClusterError: `name` ended or the time is over; the message contains the last lines of its log.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            if not self.running(name):
                raise ClusterError(f"{name} ended while waiting until {what}; {self.log_tail(name)}")
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"timed out after {timeout_s:.0f} s while waiting until {what}; {self.log_tail(name)}"
                )
            time.sleep(POLL_SECONDS)

    def log_tail(self, name: str) -> str:
        """Path of the log and its last lines."""
        log = self.log(name)
        if not log.exists():
            return f"no log at {log}"
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8_192))
            lines = file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
        return f"last lines of {log}:\n" + "\n".join(f"  {line[:300]}" for line in lines)


def without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without proxy settings: all peers of the cluster are on this machine."""
    return {name: value for name, value in environment.items() if not name.lower().endswith("_proxy")}


def end(pid: int, with_signal: signal.Signals) -> None:
    """Signal a process that may have ended."""
    try:
        os.kill(pid, with_signal)
    except ProcessLookupError:
        return


def run(command: Sequence[str | Path], timeout_s: float = 60.0, stdin: str | None = None) -> str:
    """Run a short command and return its output.

    Raises:
        ClusterError: the command failed or took longer than `timeout_s`.
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
