"""The core process: one engine, one stepping thread, one socket to its front.

The engine has its own process because a second busy Python thread makes a step several times slower, and a
second process does not. Between two steps the loop reads the messages that arrived; it sends all outputs of a
step in one write. The core ends with its front: by ``Stop``, when the socket closes, or, if it hangs, by the
kernel's parent-death signal.
"""

from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract.config import QUIET
from kvpilot_engine.errors import StartError
from kvpilot_engine.ipc import messages
from kvpilot_engine.ipc.framing import FrameReader, frame
from kvpilot_engine.ipc.messages import CoreStart
from kvpilot_engine.ipc.spawn import THREADS_VARIABLE, socket_pair

_RECEIVE_BYTES = 1 << 18
_PR_SET_PDEATHSIG = 1
_LAST_WORDS_S = 1.0


class SteppingEngine(Protocol):
    """The part of an engine that the loop uses; see :class:`kvpilot_engine.core.engine.Engine`."""

    @property
    def has_work(self) -> bool:
        """True if :meth:`step` has something to run."""

    def submit(self, request: messages.Generate) -> None:
        """Accept a request."""

    def abort(self, request_id: str) -> None:
        """Drop a request."""

    def step(self) -> list[messages.Tokens | messages.Finished]:
        """Run one step; its outputs."""

    def apply(self, change: messages.Apply) -> messages.Applied | messages.Refused:
        """Change the configuration."""

    def describe(self, request_id: str, /) -> messages.Described:
        """The live configuration."""

    def sample(self, request_id: str, /) -> messages.Sampled:
        """Counters and gauges."""

    def close(self) -> None:
        """Free everything."""


def build_engine(start: CoreStart) -> SteppingEngine:
    """The real engine, at the generation and epoch that ``start`` names.

    Raises:
        StartError: the reason, in one line.
    """
    from kvpilot_engine.core.engine import Engine  # noqa: PLC0415  (torch: only the core process pays for it)

    try:
        config = KVCacheConfig.model_validate(start.config, context=QUIET)
        engine = Engine(config, model=start.model, revision=start.revision)
    except (MemoryError, OverflowError):
        raise StartError(
            f"max_tokens: there is not enough memory for a cache of {config.max_tokens} tokens"
        ) from None
    except (ValueError, OSError, RuntimeError) as error:
        raise StartError(_one_line(error)) from error
    applied = engine.apply(messages.Apply("start", start.epoch, start.generation, {}))
    if isinstance(applied, messages.Refused):
        raise StartError(applied.message)
    return engine


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class CoreLoop:
    """Carries messages between a socket and an engine, and steps the engine while it has work."""

    def __init__(self, engine: SteppingEngine, sock: socket.socket) -> None:
        self._engine = engine
        self._sock = sock
        self._reader: FrameReader[messages.FromFront] = FrameReader(messages.FromFront)
        self._unsent = bytearray()
        self._stopping = False
        self._gone = False
        sock.setblocking(False)
        self._poll = select.poll()

    def run(self) -> None:
        """Serve until the front stops the core or goes away."""
        self._send([messages.Ready(self._engine.describe(""))])
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
        """Send the front the reason of the core's end, if it still listens."""
        _last_words(self._sock, self._unsent + frame(messages.Failed(message)))

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

    def _take(self, message: messages.FromFront) -> msgspec.Struct | None:
        match message:
            case messages.Generate():
                self._engine.submit(message)
            case messages.Abort():
                self._engine.abort(message.id)
            case messages.Apply():
                return self._engine.apply(message)
            case messages.Describe():
                return self._engine.describe(message.id)
            case messages.Sample():
                return self._engine.sample(message.id)
            case messages.Stop():
                self._stopping = True
        return None

    def _send(self, messages: Iterable[msgspec.Struct]) -> None:
        for message in messages:
            self._unsent += frame(message)
        self._flush()

    def _flush(self) -> None:
        """Send what the socket accepts now: a slow front must not delay a step."""
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
    """Send, then read until the front has closed: closing with unread input discards unsent output."""
    sock.settimeout(_LAST_WORDS_S)
    try:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(_RECEIVE_BYTES):
            continue
    except OSError:
        return  # the front is gone


def run_core(start: CoreStart, sock: socket.socket, build: Callable[[CoreStart], SteppingEngine]) -> int:
    """Build the engine and serve; the exit status of the process.

    Every fault reaches the front as one ``Failed``, and then the core ends: after an exception in a step its
    state may be inconsistent.
    """
    try:
        engine = build(start)
    except StartError as error:
        _last_words(sock, frame(messages.Failed(str(error))))
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
    if os.getppid() != parent:  # it died before the signal was set
        sys.exit(1)


def _settle_garbage_collector() -> None:
    """Exclude weights and modules, which are never freed, from collections, and collect rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def main(argv: list[str]) -> int:
    """``python -m kvpilot_engine.core.process FD PARENT_PID``, with a CoreStart as JSON on standard input."""
    descriptor, parent = int(argv[0]), int(argv[1])
    _die_with_parent(parent)
    # The front decides when to end: a signal to the process group must not abort running requests.
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


class CoreThread:
    """The same loop in a thread of this process, for tests: other Python work slows its steps."""

    def __init__(self, start: CoreStart, build: Callable[[CoreStart], SteppingEngine] = build_engine) -> None:
        self.socket, theirs = socket_pair()

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
    os._exit(status)  # everything is closed, and the teardown of torch is slow and prints warnings
