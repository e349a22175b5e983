"""The core process: one engine, one stepping thread, one socket to its front.

A process of its own, because a busy Python thread beside the stepping thread makes a step several times
slower while the same work in another process costs little. Between two steps the loop takes what has
arrived, and it sends all outputs of a step in one write. It ends with its front: by ``Stop``, when the
socket closes, or, should it hang, by the kernel's parent-death signal.
"""

from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec

from kvpilot_engine import protocol
from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract.config import QUIET
from kvpilot_engine.errors import StartError
from kvpilot_engine.wire import FrameReader, frame

THREADS_VARIABLE = "KVPILOT_TORCH_THREADS"
"""Environment variable with the number of torch threads of a core on a CPU; 1 without it."""

_MAX_THREADS = 1024

_RECEIVE_BYTES = 1 << 18
_SOCKET_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1
_LAST_WORDS_S = 1.0


class CoreStart(msgspec.Struct, frozen=True):
    """What a core is started with.

    Attributes:
        config: explicitly set fields of KVCacheConfig, camelCase.
        generation, epoch: name and fencing number of that configuration.
    """

    model: str = "builtin/tiny-llama"
    revision: str = ""
    config: dict[str, Any] = {}
    generation: int = 0
    epoch: int = 0

    @classmethod
    def of(cls, config: KVCacheConfig, **rest: Any) -> CoreStart:
        """The start of an engine with ``config``."""
        return cls(config=config.model_dump(mode="json", by_alias=True, exclude_unset=True), **rest)


class SteppingEngine(Protocol):
    """What the loop needs of :class:`kvpilot_engine.engine.Engine`."""

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` would do anything."""

    def submit(self, request: protocol.Generate) -> None:
        """Take a request."""

    def abort(self, request_id: str) -> None:
        """Drop a request."""

    def step(self) -> list[protocol.Tokens | protocol.Finished]:
        """Schedule, run, and return what came out."""

    def apply(self, change: protocol.Apply) -> protocol.Applied | protocol.Refused:
        """Change the configuration."""

    def describe(self, request_id: str, /) -> protocol.Described:
        """The live configuration."""

    def sample(self, request_id: str, /) -> protocol.Sampled:
        """Counters and gauges."""

    def close(self) -> None:
        """Free everything."""


def build_engine(start: CoreStart) -> SteppingEngine:
    """The real engine, at the generation and epoch that ``start`` names.

    Raises:
        StartError: with the one line that says why.
    """
    from kvpilot_engine.engine import Engine  # noqa: PLC0415  (torch: only the core process pays for it)

    try:
        config = KVCacheConfig.model_validate(start.config, context=QUIET)
        engine = Engine(config, model=start.model, revision=start.revision)
    except (MemoryError, OverflowError):
        raise StartError(
            f"max_tokens: there is not enough memory for a cache of {config.max_tokens} tokens"
        ) from None
    except (ValueError, OSError, RuntimeError) as error:
        raise StartError(_one_line(error)) from error
    applied = engine.apply(protocol.Apply("start", start.epoch, start.generation, {}))
    if isinstance(applied, protocol.Refused):
        raise StartError(applied.message)
    return engine


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class CoreLoop:
    """Carries messages between a socket and an engine, and steps the engine while it has work."""

    def __init__(self, engine: SteppingEngine, sock: socket.socket) -> None:
        self._engine = engine
        self._sock = sock
        self._reader: FrameReader[protocol.FromFront] = FrameReader(protocol.FromFront)
        self._unsent = bytearray()
        self._stopping = False
        self._gone = False
        sock.setblocking(False)
        self._poll = select.poll()

    def run(self) -> None:
        """Serve until the front stops the core or goes away."""
        self._send([protocol.Ready(self._engine.describe(""))])
        while True:
            self._wait_when_idle()
            self._receive()
            if self._gone or (self._stopping and not self._engine.has_work and not self._unsent):
                return
            if self._engine.has_work:
                self._send(self._engine.step())
            elif self._unsent:
                self._flush()

    def fail(self, message: str) -> None:
        """Tell the front, as far as it still listens, why the core ends."""
        _last_words(self._sock, self._unsent + frame(protocol.Failed(message)))

    def _wait_when_idle(self) -> None:
        if self._engine.has_work or (self._stopping and not self._unsent):
            return
        interest = select.POLLIN | (select.POLLOUT if self._unsent else 0)
        self._poll.register(self._sock, interest)
        self._poll.poll()

    def _receive(self) -> None:
        try:
            data = self._sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._gone = True
            return
        answers = [answer for message in self._reader.feed(data) if (answer := self._take(message))]
        if answers:
            self._send(answers)

    def _take(self, message: protocol.FromFront) -> msgspec.Struct | None:
        match message:
            case protocol.Generate():
                self._engine.submit(message)
            case protocol.Abort():
                self._engine.abort(message.id)
            case protocol.Apply():
                return self._engine.apply(message)
            case protocol.Describe():
                return self._engine.describe(message.id)
            case protocol.Sample():
                return self._engine.sample(message.id)
            case protocol.Stop():
                self._stopping = True
        return None

    def _send(self, messages: Iterable[msgspec.Struct]) -> None:
        for message in messages:
            self._unsent += frame(message)
        self._flush()

    def _flush(self) -> None:
        """Send what the socket takes now; a slow front must not hold up a step."""
        if not self._unsent:
            return
        try:
            sent = self._sock.send(self._unsent)
        except BlockingIOError:
            return
        except ConnectionError:
            self._gone = True
            return
        del self._unsent[:sent]


def _last_words(sock: socket.socket, data: bytes | bytearray) -> None:
    """Send, and read until the front has closed: to close with unread input would throw away the output."""
    sock.settimeout(_LAST_WORDS_S)
    try:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(_RECEIVE_BYTES):
            continue
    except OSError:
        return  # the front is gone, or does not listen


def run_core(start: CoreStart, sock: socket.socket, build: Callable[[CoreStart], SteppingEngine]) -> int:
    """Build the engine and serve; the exit status of the process.

    Every fault reaches the front as one ``Failed``, and then the core ends: state after an exception in a
    step is not to be trusted.
    """
    try:
        engine = build(start)
    except StartError as error:
        _last_words(sock, frame(protocol.Failed(str(error))))
        return 2
    loop = CoreLoop(engine, sock)
    try:
        loop.run()
    except Exception as error:
        traceback.print_exc()
        loop.fail(f"{type(error).__name__}: {_one_line(error)}")
        return 1
    finally:
        engine.close()
    return 0


def _die_with_parent(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the signal was armed
        sys.exit(1)


def _settle_garbage_collector() -> None:
    """Weights and modules live for ever: keep them out of every collection, and collect rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def main(argv: list[str]) -> int:
    """``python -m kvpilot_engine.core FD PARENT_PID``, with a CoreStart as JSON on standard input."""
    descriptor, parent = int(argv[0]), int(argv[1])
    _die_with_parent(parent)
    # The front decides when to end: a signal to the whole process group must not cut off what is running.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start = msgspec.json.decode(sys.stdin.buffer.read(), type=CoreStart)
    sock = socket.socket(fileno=descriptor)

    def build(start: CoreStart) -> SteppingEngine:
        import torch  # noqa: PLC0415

        torch.set_num_threads(int(os.environ.get(THREADS_VARIABLE, "1")))
        engine = build_engine(start)
        _settle_garbage_collector()
        return engine

    return run_core(start, sock, build)


def _threads() -> str:
    """The number of torch threads, checked before a core is spawned that would trip over it."""
    threads = os.environ.get(THREADS_VARIABLE, "1")
    if not threads.isdecimal() or not 1 <= int(threads) <= _MAX_THREADS:
        raise StartError(
            f"{THREADS_VARIABLE}: must be a whole number from 1 to {_MAX_THREADS}, got {threads!r:.80}"
        )
    return threads


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
    return ours, theirs


class CoreProcess:
    """A spawned core process and the front's end of its socket.

    Spawn it from a thread that lives as long as the front does: the parent-death signal follows the thread.
    """

    def __init__(self, start: CoreStart) -> None:
        threads = _threads()
        self.socket, theirs = _socket_pair()
        environment = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "kvpilot_engine.core", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env={**environment, **os.environ},
            )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(start))
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once: the closed socket tells the client

    @property
    def pid(self) -> int:
        """Process id of the core."""
        return self._process.pid

    def end(self, timeout_s: float) -> str:
        """Wait for its end, kill it after ``timeout_s``; how it ended, in words."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        return f"signal {-status}" if status < 0 else f"exit status {status}"


class CoreThread:
    """The same loop in a thread of this process, for tests: steps are slower beside other Python work."""

    def __init__(self, start: CoreStart, build: Callable[[CoreStart], SteppingEngine] = build_engine) -> None:
        self.socket, theirs = _socket_pair()

        def serve() -> None:
            with theirs:
                run_core(start, theirs, build)

        self._thread = threading.Thread(target=serve, name="kvpilot-core", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Process id of the core: this process."""
        return os.getpid()

    def end(self, timeout_s: float) -> str:
        """Wait for the thread's end, at most ``timeout_s``."""
        self._thread.join(timeout_s)
        return "still running" if self._thread.is_alive() else "ended"


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # everything is closed; tearing down torch's modules takes time and complains
