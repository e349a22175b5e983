"""Host memory against its limit: anonymous and shared memory, but no file cache, which can be reclaimed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.metrics import Samples
from kvpilot_engine.ipc.messages import Sampled

LIMIT_VARIABLE = "KVPILOT_MEMORY_LIMIT_BYTES"
"""Environment variable that replaces the detected limit; local mode sets it to the limit of the template."""

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


def anonymous_bytes(pid: int | None = None) -> int:
    """Anonymous memory of a process plus its share of shared memory, bytes; by default of this process.

    Shared memory counts by proportional share, so that a sum over processes counts it once. The kernel walks
    the page table, which takes milliseconds for each GiB: call it a few times a second at most.
    """
    process = _PROC / ("self" if pid is None else str(pid))
    try:
        text = (process / "smaps_rollup").read_text()
    except OSError:  # not every sandbox has it: these counters count shared memory in full
        fields = _fields((process / "status").read_text())
        return fields.get("RssAnon", 0) + fields.get("RssShmem", 0)
    fields = _fields(text)
    return fields.get("Anonymous", 0) + fields.get("Pss_Shmem", 0)


def _fields(text: str) -> dict[str, int]:
    values = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith(" kB"):
            values[name] = int(rest[:-3]) * 1024
    return values


def limit_bytes() -> int:
    """The memory that this engine may use, bytes: the override, else the cgroup's limit, else the machine's.

    Raises:
        ValueError: when the override is not a positive whole number.
    """
    if given := os.environ.get(LIMIT_VARIABLE):
        if not given.isdecimal() or int(given) == 0:
            raise ValueError(f"{LIMIT_VARIABLE}: must be a positive whole number of bytes, got {given!r}")
        return int(given)
    machine = _fields((_PROC / "meminfo").read_text())["MemTotal"]
    limits = cgroup_limits((_PROC / "self" / "cgroup").read_text(), _CGROUP)
    return min([machine, *limits])


def cgroup_limits(membership: str, root: Path) -> list[int]:
    """Memory limits of this process's cgroup and of its parents up to ``root``, v2 and v1, bytes.

    Args:
        membership: text of ``/proc/self/cgroup``.
        root: where the cgroup file systems are mounted.
    """
    found = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the path can be that of the host, of which only the root is mounted.
        group = Path(path.lstrip("/"))
        for level in (group, *group.parents):
            text = _read(mount / level / name)
            if text.isdecimal() and int(text) < _UNLIMITED:
                found.append(int(text))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class Memory:
    """Bytes in use and their limits; without a device its limit is 0."""

    host_bytes: int
    host_limit_bytes: int
    device_bytes: int
    device_limit_bytes: int

    @property
    def host_ratio(self) -> float:
        """Used host memory over its limit."""
        return self.host_bytes / self.host_limit_bytes

    @property
    def device_ratio(self) -> float:
        """Used device memory over its limit; 0 without a device."""
        return self.device_bytes / self.device_limit_bytes if self.device_limit_bytes else 0.0

    @property
    def ratio(self) -> float:
        """The larger of both, which the memory objective limits."""
        return max(self.host_ratio, self.device_ratio)

    def gauges(self) -> Samples:
        """Samples of the memory metrics."""
        return {
            names.MEMORY_RATIO: {"host": self.host_ratio, "device": self.device_ratio},
            names.MEMORY_BYTES: {"host": self.host_bytes, "device": self.device_bytes},
            names.MEMORY_LIMIT_BYTES: {"host": self.host_limit_bytes, "device": self.device_limit_bytes},
        }


def memory_of(sampled: Sampled, front_bytes: int, limit_bytes: int) -> Memory:
    """Memory of core and front together."""
    return Memory(
        sampled.host_bytes + front_bytes, limit_bytes, sampled.device_bytes, sampled.device_limit_bytes
    )
