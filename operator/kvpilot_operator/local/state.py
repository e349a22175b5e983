"""State of local mode on disk, in ``.kvpilot/NAME/``, instead of objects in an API server."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from kvpilot_operator.local.overrides import OverrideFolder
from kvpilot_operator.status.history import parse_records
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import Promoted

ROOT = Path(".kvpilot")
OVERRIDES = "overrides"
KEPT_RECORDS = 50


class BusyError(Exception):
    """Another process runs this resource; the message names the resource and the process."""


def is_up(directory: Path) -> bool:
    """True if a running process has locked the directory of a resource."""
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

    - ``resource.json``: the object with its status;
    - ``config.yaml``: the promoted configuration and its generation;
    - ``decisions.jsonl``: the last `KEPT_RECORDS` decision records, oldest first;
    - ``overrides/``: the KVCacheOverrides of the resource;
    - ``replicas.json``: the metrics pages of the replicas that run;
    - ``kvpilot.log``, ``REPLICA.log``: logs of this process and of the engines.
    """

    def __init__(self, name: str, root: Path = ROOT) -> None:
        self.path = root / name
        self.overrides = OverrideFolder(self.path / OVERRIDES)
        self._name = name
        self._lock: IO[str] | None = None

    def open(self) -> None:
        """Create and lock the directory; files of an earlier run stay until ``clear``.

        Raises:
            BusyError: another process has locked it.
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
        self._lock = lock  # the kernel releases it when this process ends, however it ends

    def clear(self, *, fresh: bool) -> None:
        """Delete the logs of an earlier run, and with ``fresh`` its state too."""
        if fresh:
            for name in ("resource.json", "config.yaml", "decisions.jsonl"):
                (self.path / name).unlink(missing_ok=True)
            self.overrides.clear()
        for log in self.path.glob("*.log"):
            log.unlink()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()

    def read_resource(self) -> dict[str, Any] | None:
        """The object of an earlier run; None without a readable one."""
        try:
            content = json.loads((self.path / "resource.json").read_text())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def write_resource(self, manifest: Mapping[str, Any]) -> None:
        """Store the object."""
        self._write("resource.json", json.dumps(manifest, indent=1) + "\n")

    def write_replicas(self, pages: Mapping[str, str]) -> None:
        """Store the URL of each replica's metrics page by its name."""
        self._write("replicas.json", json.dumps(pages) + "\n")

    def read_config(self) -> Promoted | None:
        """The promoted configuration of an earlier run; None without a readable one."""
        try:
            content = yaml.safe_load((self.path / "config.yaml").read_text())
            return Promoted(int(content["generation"]), dict(content["config"]))
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            return None

    def write_config(self, promoted: Promoted) -> None:
        """Store the promoted configuration."""
        self._write("config.yaml", config_text(promoted.generation, promoted.config))

    def write_start(self, replica: str, text: str) -> Path:
        """Write the configuration file that an engine starts with; its path."""
        return self._write(f"{replica}.yaml", text)

    def records(self) -> list[Mapping[str, Any]]:
        """The decision records that are kept, oldest first."""
        path = self.path / "decisions.jsonl"
        return parse_records(path.read_text() if path.exists() else "")

    def add_record(self, record: Record) -> None:
        """Append a decision record, and drop the oldest beyond `KEPT_RECORDS`."""
        path = self.path / "decisions.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        lines.append(json.dumps(dataclasses.asdict(record), default=str))
        self._write(path.name, "\n".join(lines[-KEPT_RECORDS:]) + "\n")

    def _write(self, name: str, text: str) -> Path:
        """Replace a file atomically, so that a reader never sees a part of it."""
        path = self.path / name
        draft = path.with_suffix(path.suffix + ".new")
        draft.write_text(text)
        draft.replace(path)
        return path


def config_text(generation: int, config: Mapping[str, Any]) -> str:
    """The YAML text that an engine's ``--config`` reads."""
    return yaml.safe_dump({"generation": generation, "config": dict(config)}, sort_keys=False)
