"""Every exception that the engine raises to its callers.

::

    EngineError
    ├── InvalidRequestError       the request itself is wrong: a field, a value, or a prompt that is too long
    │   └── RequestTooLargeError  the cache's quota (``max_tokens``, ``max_memory_mb``) is too small for it
    ├── QueueFullError            as many requests wait as ``max_queue`` allows (HTTP only; Python waits)
    ├── RequestTimeoutError       it ran longer than ``request_timeout_s``
    ├── RequestCancelledError     its client left
    ├── RequestFailedError        a fault inside the engine ended this request
    ├── CoreUnavailableError      the core process ended; nothing can be served any more
    ├── StartError                the engine cannot start with this model and configuration
    └── ChangeRefusedError        a configuration change was refused whole; the old one stays

Wrong values of :class:`~kvpilot_engine.contract.KVCacheConfig` are ``pydantic.ValidationError``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from kvpilot_engine.contract.metrics import Outcome
from kvpilot_engine.contract.wording import counted


class EngineError(Exception):
    """Base of every exception of the engine; the text is one line.

    Attributes:
        outcome: how a request that ends with this error is counted.
    """

    outcome: ClassVar[Outcome] = Outcome.ERROR


class InvalidRequestError(EngineError, ValueError):
    """A wrong request; the message names the field, its value and what is allowed."""

    outcome = Outcome.INVALID

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class RequestTooLargeError(InvalidRequestError):
    """A request that the model could serve, but the quota of the cache is too small for."""

    outcome = Outcome.TOO_LARGE


class QueueFullError(EngineError):
    """A request that was shed because the queue is full.

    Attributes:
        retry_after_s: seconds until the queue has drained at the present rate.
    """

    outcome = Outcome.SHED

    def __init__(self, waiting: int, max_queue: int, retry_after_s: int) -> None:
        super().__init__(
            f"overloaded: {counted(waiting, 'request', 'waits', 'wait')} and max_queue is {max_queue}; "
            f"retry after {retry_after_s} s"
        )
        self.retry_after_s = retry_after_s


class RequestTimeoutError(EngineError, TimeoutError):
    """A request ran longer than ``request_timeout_s``."""

    outcome = Outcome.TIMEOUT


class RequestCancelledError(EngineError):
    """A request whose client left before its end."""

    outcome = Outcome.CANCELLED


class RequestFailedError(EngineError):
    """A fault inside the engine ended one request; the others continue."""


class CoreUnavailableError(EngineError):
    """There is no core process: it is still loading, it ended by itself, or the engine was shut down."""


class StartError(EngineError):
    """The engine cannot start: wrong model, wrong configuration for it, or a failed self-check."""


RefusalCode = Literal["stale_epoch", "invalid", "cold"]


class ChangeRefusedError(EngineError, ValueError):
    """A configuration change that was refused whole.

    Attributes:
        code: ``stale_epoch`` (a writer with a higher epoch was here), ``cold`` (needs a restart) or
            ``invalid``.
    """

    def __init__(self, code: RefusalCode, message: str) -> None:
        super().__init__(message)
        self.code = code
