"""The background thread of the cache: copies and codecs, off the stepping thread.

Jobs run on this thread and land on the stepping thread, so that all bookkeeping is single-threaded; torch
releases the interpreter lock while it computes. Loads run before encodings, because only loads have requests
that wait for them.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections import deque

import torch


class Job(ABC):
    """Work in two parts.

    Attributes:
        error: what ``run`` raised.
        ready: event of the device after which ``run`` may start.
    """

    error: Exception | None = None
    ready: torch.cuda.Event | None = None

    @abstractmethod
    def run(self) -> None:
        """Compute, on the worker's thread."""

    @abstractmethod
    def land(self) -> None:
        """Do the bookkeeping, on the stepping thread."""


class TierWorker:
    """A thread that starts with its first job and ends with ``close``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._urgent: deque[Job] = deque()
        self._other: deque[Job] = deque()
        self._done: deque[Job] = deque()
        self._changed = threading.Condition()
        self._pending = 0  # submitted and not landed yet
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, job: Job, *, urgent: bool) -> None:
        """Queue a job. On CUDA it starts after all work that the stepping thread has launched so far."""
        if self._device.type == "cuda":
            job.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            job.ready.record(torch.cuda.current_stream(self._device))
        with self._changed:
            self._pending += 1
            (self._urgent if urgent else self._other).append(job)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="kvpilot-tier-worker", daemon=True)
            self._thread.start()

    def land(self) -> None:
        """Land the finished jobs."""
        while self._done:
            job = self._done.popleft()
            self._pending -= 1
            job.land()

    def wait(self, timeout_s: float) -> None:
        """Block until a job can land, none is pending, or the timeout."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._done) or not self._pending, timeout_s)

    def close(self) -> None:
        """Finish the current job, drop the others, end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
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
                with self._changed:
                    self._done.append(job)
                    self._changed.notify_all()

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._urgent or self._other)
            if self._closed:
                return None
            return self._urgent.popleft() if self._urgent else self._other.popleft()
