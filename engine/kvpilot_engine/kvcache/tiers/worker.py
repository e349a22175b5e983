"""The one background thread of the cache: copies and codecs, off the stepping thread.

Jobs run there and land on the stepping thread, so all bookkeeping stays single-threaded; torch releases the
interpreter lock while it computes. Loads go before encodings, since requests wait for loads only.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections import deque

import torch


class Job(ABC):
    """Work in two halves."""

    error: Exception | None = None
    ready: torch.cuda.Event | None = None

    @abstractmethod
    def run(self) -> None:
        """The heavy half, on the loader's thread."""

    @abstractmethod
    def land(self) -> None:
        """The bookkeeping, on the stepping thread; ``error`` holds what ``run`` raised."""


class Loader:
    """A thread that is started by its first job and ended by ``close``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._urgent: deque[Job] = deque()
        self._calm: deque[Job] = deque()
        self._done: deque[Job] = deque()
        self._state = threading.Condition()
        self._pending = 0  # submitted and not yet landed
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, job: Job, *, urgent: bool) -> None:
        """Queue a job. On CUDA it starts after everything that the stepping thread has launched so far."""
        if self._device.type == "cuda":
            job.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            job.ready.record(torch.cuda.current_stream(self._device))
        with self._state:
            self._pending += 1
            (self._urgent if urgent else self._calm).append(job)
            self._state.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="kvpilot-loader", daemon=True)
            self._thread.start()

    def land(self) -> bool:
        """Land what has finished; True if anything has."""
        landed = False
        while self._done:
            job = self._done.popleft()
            self._pending -= 1
            job.land()
            landed = True
        return landed

    def wait(self, timeout_s: float) -> None:
        """Block until a job is ready to land, none is under way, or the time is up."""
        with self._state:
            self._state.wait_for(lambda: bool(self._done) or not self._pending, timeout_s)

    def close(self) -> None:
        """Finish the job at hand, drop the others, end the thread."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        stream = None
        if self._device.type == "cuda":
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        # Buffers may have been made under the stepping thread's inference mode.
        with torch.inference_mode(), torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            while (job := self._next()) is not None:
                try:
                    if stream is not None and job.ready is not None:
                        stream.wait_event(job.ready)
                    job.run()
                    if stream is not None:
                        stream.synchronize()
                except Exception as error:
                    job.error = error
                with self._state:
                    self._done.append(job)
                    self._state.notify_all()

    def _next(self) -> Job | None:
        with self._state:
            self._state.wait_for(lambda: self._closed or self._urgent or self._calm)
            if self._closed:
                return None
            return self._urgent.popleft() if self._urgent else self._calm.popleft()
