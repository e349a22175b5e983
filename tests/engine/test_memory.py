"""Memory in use and its limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpilot_engine import memory
from kvpilot_engine.ipc.messages import Sampled

GIB = 2**30


def test_anonymous_memory_of_this_process_grows_with_written_bytes() -> None:
    before = memory.anonymous_bytes()
    block = bytearray(64 * 2**20)
    assert memory.anonymous_bytes() - before == pytest.approx(len(block), rel=0.2)


def test_memory_limit_is_the_override_else_at_most_that_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVPILOT_MEMORY_LIMIT_BYTES", str(3 * GIB))
    assert memory.limit_bytes() == 3 * GIB
    monkeypatch.setenv("KVPILOT_MEMORY_LIMIT_BYTES", "0")
    with pytest.raises(ValueError, match="KVPILOT_MEMORY_LIMIT_BYTES: must be a positive whole number"):
        memory.limit_bytes()
    monkeypatch.delenv("KVPILOT_MEMORY_LIMIT_BYTES")
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < memory.limit_bytes() <= total


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "files", "limits"),
    [
        ("0::/", {"memory.max": f"{2 * GIB}\n"}, [2 * GIB]),
        ("0::/", {"memory.max": "max\n"}, []),
        ("0::/kubepods/pod1/c1", {"kubepods/pod1/memory.max": str(GIB), "memory.max": "max"}, [GIB]),
        ("0::/of/the/host/only", {"memory.max": str(GIB)}, [GIB]),
        ("4:memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": str(GIB)}, [GIB]),
        ("4:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, []),
        ("3:cpu,cpuacct:/a", {"memory.max": str(GIB)}, []),
    ],
)
def test_cgroup_limits(tmp_path: Path, membership: str, files: dict[str, str], limits: list[int]) -> None:
    assert memory.cgroup_limits(membership, written(tmp_path, files)) == limits


def test_memory_ratio_sums_core_and_front_and_is_the_larger_of_host_and_device() -> None:
    sampled = Sampled("", {}, {}, 3 * GIB, 9 * GIB, 10 * GIB)
    both = memory.memory_of(sampled, GIB, 8 * GIB)
    assert (both.host_ratio, both.device_ratio, both.ratio) == (0.5, 0.9, 0.9)
    assert memory.memory_of(Sampled("", {}, {}, GIB, 0, 0), GIB, 8 * GIB).ratio == 0.25
