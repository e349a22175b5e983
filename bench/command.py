"""Exit statuses of the benchmarks, and the error line of a benchmark that cannot run."""

from __future__ import annotations

import sys
from collections.abc import Callable

FAILED = 1
CANNOT_RUN = 2


class CannotRunError(Exception):
    """Something that the benchmark needs is missing: a trace, a server, an engine that starts."""


def run(name: str, main: Callable[[], int]) -> int:
    """Exit status of ``main``; `CANNOT_RUN`, and one line, if what it needs is missing."""
    try:
        return main()
    except (CannotRunError, OSError) as error:
        print(f"{name}: cannot run: {error}", file=sys.stderr)
        return CANNOT_RUN
