"""Every exception that the engine raises to its callers.

::

    EngineError
    ├── InvalidRequestError       the request itself is wrong: a field, a value, or a prompt that is too long
    ├── RequestTimeoutError       it ran longer than ``request_timeout_s``
    ├── RequestCancelledError     its client left
    ├── RequestFailedError        a fault inside the engine ended this request
    ├── CoreUnavailableError      the core process ended; nothing can be served any more
    ├── StartError          the engine cannot start with this model and configuration
    └── ChangeRefusedError        a configuration change was refused whole; the old one stays

Wrong values of :class:`~kvpilot_engine.contract.KVCacheConfig` are ``pydantic.ValidationError``.
"""

from __future__ import annotations

from typing import Literal


class EngineError(Exception):
    """Base of everything the engine raises; its text is one clear line."""


class InvalidRequestError(EngineError, ValueError):
    """A request that cannot be served as asked. The message names field, value and what is allowed."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class RequestTimeoutError(EngineError, TimeoutError):
    """A request outlived ``request_timeout_s``."""


class RequestCancelledError(EngineError):
    """A request whose client left before its end."""


class RequestFailedError(EngineError):
    """A fault inside the engine ended one request; others go on."""


class CoreUnavailableError(EngineError):
    """The core process is not there: it ended by itself, or the engine was shut down."""


class StartError(EngineError):
    """The engine cannot start: wrong model, wrong configuration for it, or a self-check that failed."""


RefusalCode = Literal["stale_epoch", "invalid", "cold"]


class ChangeRefusedError(EngineError, ValueError):
    """A configuration change that was refused whole.

    Attributes:
        code: ``stale_epoch`` (a newer writer was here), ``cold`` (needs a restart) or ``invalid``.
    """

    def __init__(self, code: RefusalCode, message: str) -> None:
        super().__init__(message)
        self.code = code
