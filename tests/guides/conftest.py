"""Code of the guides, an engine for each of their configurations, PostgreSQL and Redis."""

from __future__ import annotations

import ast
import contextlib
import itertools
import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.ports import free_port

from kvpilot_engine import CacheStrategy, ConfigWarning, KVCacheConfig, KVCacheEngine

HERE = Path(__file__).parent
MAY_INSTALL = os.environ.get("CI") == "true" or os.environ.get("INSTALL") == "1"
REPLACED_IMPORTS = {
    "from bulk.core.ultra_adaptive_kv_cache_analytics import PerformanceAnalyzer": (
        "from kvpilot_engine import PerformanceAnalyzer"
    )
}


class Snippets:
    """Code blocks by name; records which ones tests have run."""

    def __init__(self) -> None:
        self._code: dict[str, str] = {}
        for guide in sorted(HERE.glob("performance-*.txt")):
            blocks = re.findall(r"^## ([^\n]+)\n```\w+\n(.*?)^```", guide.read_text(), re.S | re.M)
            self._code.update(dict(blocks))
        self.used: set[str] = set()

    @property
    def names(self) -> set[str]:
        return set(self._code)

    def text(self, name: str) -> str:
        """The block as written, except for replaced import lines."""
        self.used.add(name)
        code = self._code[name]
        for line, ours in REPLACED_IMPORTS.items():
            code = code.replace(line, ours)
        return code

    def run(self, name: str, **scope: Any) -> dict[str, Any]:
        """Run a block with these names in scope; all names in scope afterwards."""
        exec(compile(self.text(name), name, "exec"), scope)
        return scope

    async def run_async(self, name: str, **scope: Any) -> dict[str, Any]:
        """Like `run`, for a block with a top-level await."""
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        await eval(compile(self.text(name), name, "exec", flags=flags), scope)
        return scope


@pytest.fixture(scope="session")
def snippets() -> Snippets:
    return Snippets()


@pytest.fixture(scope="session")
def configs(snippets: Snippets) -> dict[str, KVCacheConfig]:
    import torch

    scope = {"KVCacheConfig": KVCacheConfig, "CacheStrategy": CacheStrategy, "torch": torch}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfigWarning)
        return {
            name: snippets.run(f"{name} config", **scope)["config"] for name in ("high performance", "memory")
        }


@pytest.fixture(scope="session")
def engines(configs: dict[str, KVCacheConfig]) -> Iterator[dict[str, KVCacheEngine]]:
    """Both engines, started in parallel because each start takes seconds."""
    with ThreadPoolExecutor() as pool:
        running = dict(zip(configs, pool.map(KVCacheEngine, configs.values()), strict=True))
    yield running
    for engine in running.values():
        engine.shutdown()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a block that measures once: ``time.time`` moves on by 4 s with each reading."""
    readings = itertools.count(1_000_000, 4)
    monkeypatch.setattr(time, "time", lambda: float(next(readings)))


@pytest.fixture
def engine(engines: dict[str, KVCacheEngine]) -> KVCacheEngine:
    return engines["high performance"]


def missing(program: str, package: str) -> None:
    """Install a package if that is allowed, else skip the test and print the command."""
    command = ["apt-get", "install", "-y", "--no-install-recommends", package]
    if not MAY_INSTALL:
        pytest.skip(f"{program} is not installed; install it with `{' '.join(command)}`, or set INSTALL=1")
    # RUNLEVEL=1: the package must not start its own service.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for each in (["apt-get", "update", "-q"], command):
        done = subprocess.run(each, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0:
            pytest.fail(f"{' '.join(each)}: {done.stderr[-500:]}")


def program(name: str, package: str, *elsewhere: str) -> str:
    """Path of a program, from PATH or a glob of ``elsewhere``; installs its package if it is missing."""

    def find() -> str | None:
        found = [str(path) for pattern in elsewhere for path in sorted(Path("/").glob(pattern))]
        return shutil.which(name) or next(iter(found[::-1]), None)

    if find() is None:
        missing(name, package)
    path = find()
    assert path is not None, f"{package} is installed but contains no {name}"
    return path


def listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.2):
        return True
    return False


@contextlib.contextmanager
def daemon(command: list[str], port: int, user: str | None = None) -> Iterator[None]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        user=user,
        extra_groups=[] if user else None,
    )
    try:
        deadline = time.monotonic() + 60
        while not listening(port):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                assert process.stdout is not None
                pytest.fail(f"{command[0]} does not listen: {process.stdout.read().decode()[-800:]}")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that another user may own; pytest's directories are accessible to this user only."""
    path = Path(tempfile.mkdtemp(prefix="kvpilot-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def other_user() -> str | None:
    """The user to run PostgreSQL as if this user is root, because it refuses to run as root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


@pytest.fixture
def postgres_url(home: Path) -> Iterator[str]:
    """URL of a PostgreSQL for this test."""
    where = "usr/lib/postgresql/*/bin"
    initdb = program("initdb", "postgresql", f"{where}/initdb")
    server = program("postgres", "postgresql", f"{where}/postgres")
    user, port, data = other_user(), free_port(), home / "data"
    if user is not None:
        shutil.chown(home, user)
    command = [
        initdb,
        "-D",
        str(data),
        "-U",
        "kvpilot",
        "-A",
        "trust",
        "--no-sync",
        "-E",
        "UTF8",
        "--locale=C",
    ]
    subprocess.run(
        command, check=True, capture_output=True, user=user, extra_groups=[] if user else None, cwd=home
    )
    start = [server, "-D", str(data), "-p", str(port), "-k", str(home), "-c", "fsync=off"]
    with daemon([*start, "-c", "listen_addresses=127.0.0.1"], port, user):
        yield f"postgresql+psycopg://kvpilot@127.0.0.1:{port}/postgres"


@pytest.fixture
def redis_server(home: Path) -> Iterator[None]:
    """A Redis for this test on port 6379, which is a constant in the guide's code."""
    server = program("redis-server", "redis-server")
    if listening(6379):
        trouble = "port 6379 is taken by a server that is not this test's; stop it to run this test"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(trouble)
    command = [server, "--port", "6379", "--bind", "127.0.0.1", "--save", "", "--dir", str(home)]
    with daemon(command, 6379):
        yield
