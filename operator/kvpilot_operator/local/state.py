"""What local mode keeps on disk, ``.kvpilot/NAME/``: the place of the API server's objects."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import Promoted

ROOT = Path(".kvpilot")
KEPT_RECORDS = 50


class BusyError(Exception):
    """Another process runs this resource: one line naming both."""


def is_up(directory: Path) -> bool:
    """Whether a process has the directory of a resource now."""
    try:
        with (directory / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class StateDirectory:
    """The files of one resource.

    - ``resource.json``: the whole object, status included;
    - ``config.yaml``: generation and configuration that were promoted last;
    - ``decisions.jsonl``: the last whole records, oldest first;
    - ``kvpilot.log``, ``POD.log``: logs of this process and of the engines.
    """

    def __init__(self, name: str, root: Path = ROOT) -> None:
        self.path = root / name
        self._name = name
        self._lock: IO[str] | None = None

    def open(self) -> None:
        """Make the directory and take it. What an earlier run left in it stays until ``clear``.

        Raises:
            BusyError: another process has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            raise BusyError(f"{self._name} is already up in {self.path} (process {owner})") from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock  # held by the kernel until this process ends, however it ends

    def clear(self, *, fresh: bool) -> None:
        """Remove the logs of an earlier run; ``fresh`` forgets what it learned, too."""
        if fresh:
            for name in ("resource.json", "config.yaml", "decisions.jsonl"):
                (self.path / name).unlink(missing_ok=True)
        for log in self.path.glob("*.log"):
            log.unlink()

    def close(self) -> None:
        """Let others have the directory."""
        if self._lock is not None:
            self._lock.close()

    def read_resource(self) -> dict[str, Any] | None:
        """The object of an earlier run, or None."""
        try:
            content = json.loads((self.path / "resource.json").read_text())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def write_resource(self, manifest: Mapping[str, Any]) -> None:
        """Keep the object."""
        self._write("resource.json", json.dumps(manifest, indent=1) + "\n")

    def read_config(self) -> Promoted | None:
        """The configuration that was promoted last, or None."""
        try:
            content = yaml.safe_load((self.path / "config.yaml").read_text())
            return Promoted(int(content["generation"]), dict(content["config"]))
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            return None

    def write_config(self, promoted: Promoted) -> None:
        """Keep a configuration as the last known good one."""
        self._write("config.yaml", config_text(promoted.generation, promoted.config))

    def write_start(self, pod: str, text: str) -> Path:
        """The file that one engine starts with."""
        return self._write(f"{pod}.yaml", text)

    def add_record(self, record: Record) -> None:
        """Keep a whole decision record."""
        path = self.path / "decisions.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        lines.append(json.dumps(dataclasses.asdict(record), default=str))
        self._write(path.name, "\n".join(lines[-KEPT_RECORDS:]) + "\n")

    def _write(self, name: str, text: str) -> Path:
        """Replace a file at once: a reader never sees half of it."""
        path = self.path / name
        draft = path.with_suffix(path.suffix + ".new")
        draft.write_text(text)
        draft.replace(path)
        return path


def config_text(generation: int, config: Mapping[str, Any]) -> str:
    """What an engine's ``--config`` reads."""
    return yaml.safe_dump({"generation": generation, "config": dict(config)}, sort_keys=False)
