"""Parts of the front that need no engine: memory limits, metric keys, an admin port without a token."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvpilot_engine import memory
from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.protocol import Sampled
from kvpilot_engine.server.admin import build_admin
from kvpilot_engine.server.front import Front
from kvpilot_engine.server.lifecycle import bind
from kvpilot_engine.server.metrics import split_key
from kvpilot_engine.tokenizer import load_tokenizer

GIB = 2**30


def test_own_anonymous_memory_grows_with_what_is_written() -> None:
    before = memory.anonymous_bytes()
    block = bytearray(64 * 2**20)
    assert memory.anonymous_bytes() - before == pytest.approx(len(block), rel=0.2)


def test_limit_is_the_override_else_never_more_than_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_memory_ratio_sums_core_and_front_and_takes_the_fuller_side() -> None:
    sampled = Sampled("", {}, {}, 3 * GIB, 9 * GIB, 10 * GIB)
    both = memory.memory_of(sampled, GIB, 8 * GIB)
    assert (both.host_ratio, both.device_ratio, both.ratio) == (0.5, 0.9, 0.9)
    assert memory.memory_of(Sampled("", {}, {}, GIB, 0, 0), GIB, 8 * GIB).ratio == 0.25


def test_sample_keys() -> None:
    assert split_key("kvpilot_steps_total") == ("kvpilot_steps_total", None, "")
    assert split_key("kvpilot_cached_pages{tier=pool}") == ("kvpilot_cached_pages", "tier", "pool")
    assert split_key('x{rows="16"}') == ("x", "rows", "16")
    with pytest.raises(ValueError, match="sample key: must be name or name"):
        split_key("no spaces allowed")


@pytest.fixture
def front() -> Front:
    return Front("builtin/tiny-llama", KVCacheConfig(), load_tokenizer("builtin/tiny-llama"))


def admin_client(front: Front, token: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(build_admin(front, token))
    return httpx.AsyncClient(transport=transport, base_url="http://admin")


async def test_admin_port_without_a_token_refuses_everything(front: Front) -> None:
    async with admin_client(front, lambda: None) as client:
        for header in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer None"}):
            answer = await client.get("/admin/config", headers=header)
            assert answer.status_code == 403
            assert "started without a token" in answer.json()["error"]["message"]


async def test_renewed_token_file_counts_at_once_and_a_loading_engine_says_so(front: Front) -> None:
    tokens = ["old"]
    async with admin_client(front, lambda: tokens[0]) as client:
        header = {"Authorization": "Bearer old"}
        answer = await client.get("/admin/config", headers=header)
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the model is still loading")
        tokens[0] = "new"
        assert (await client.get("/admin/config", headers=header)).status_code == 401


def test_probes_tell_loading_ready_draining_and_dead_apart(front: Front) -> None:
    assert front.not_ready() == "the model is still loading"
    front.client = object()  # type: ignore[assignment]
    assert front.not_ready() is None
    front.draining = True
    assert front.not_ready() == "draining"
    front.fatal = "the core died"
    assert front.not_ready() == "the core died"


def test_small_writes_are_not_held_back() -> None:
    """asyncio turns Nagle's algorithm off only for a socket that names its protocol."""
    with bind("--port", "127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
