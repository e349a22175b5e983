"""Independent runs on all cores."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import structlog

Job = TypeVar("Job")
Result = TypeVar("Result")

COLLECT_AFTER = 200_000
"""Objects made before the garbage collector runs: a simulation makes many and hardly any cycle."""


def in_parallel(work: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
    """``work`` of every job, in their order. ``work`` and jobs must be picklable."""
    cores = min(os.cpu_count() or 1, len(jobs))
    if cores <= 1:
        prepare()
        yield from map(work, jobs)
        return
    with ProcessPoolExecutor(cores, initializer=_prepare_worker) as pool:
        yield from pool.map(work, jobs)


def _prepare_worker() -> None:
    """Prepare a process of the pool, which ends with its parent: a killed parent tells it nothing."""
    prepare()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def prepare() -> None:
    """Make this process quick: no log of the reconciler, and few collections."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 20, 100)
