"""Logs: JSON lines on standard error, one event each. A value whose name suggests a secret is not written."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

_SECRET = re.compile(r"token|secret|password|authorization|api_?key", re.IGNORECASE)
_BEARER = re.compile(r"(?i)\b(bearer)\s+[\w.~+/=-]+")

REDACTED = "[redacted]"


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace secrets: values whose names suggest one, and bearer tokens within text."""
    for key, value in event.items():
        if _SECRET.search(key):
            event[key] = REDACTED
        elif isinstance(value, str):
            event[key] = _BEARER.sub(rf"\1 {REDACTED}", value)
    return event


def configure(level: str = "INFO") -> None:
    """Send structlog's and the libraries' logs through one JSON formatter to standard error."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.dict_tracebacks,
                redact,
                structlog.processors.JSONRenderer(default=str),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    # At INFO they log one line for each request or watch event.
    for name in ("aiohttp.access", "urllib3", "kubernetes", "asyncio", "kopf.objects"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The error that ends its retries is logged by the caller.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
