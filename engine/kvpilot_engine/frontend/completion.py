"""What the HTTP server and the Python API share: limits of a request, stop strings, how a request ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from kvpilot_engine import protocol
from kvpilot_engine.errors import (
    InvalidRequestError,
    RequestCancelledError,
    RequestFailedError,
    RequestTimeoutError,
)

DEFAULT_NEW_TOKENS = 16
"""New tokens of a completion that does not say how many it wants."""

PRIORITY_BOUND = 1_000_000
"""Largest magnitude of a priority; higher is more urgent."""

SEED_BOUND = 2**63
"""Seeds have 64 bits."""


_SHOWN = 80  # characters of a wrong value that an error repeats


def fault_lines(error: ValidationError, unknown: str) -> list[str]:
    """One clause for each field of a request that is at fault: its name, what is allowed, and what was given.

    Args:
        error: of the request's model.
        unknown: what to say of a field that the model does not have.
    """
    lines = []
    for item in error.errors():
        where = ".".join(map(str, item["loc"])) or "body"
        if item["type"] == "missing":
            lines.append(f"{where}: required")
        elif item["type"] == "extra_forbidden":
            lines.append(f"{where}: {unknown}")
        else:
            text = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
            lines.append(f"{where}: {text[:1].lower()}{text[1:]}, got {_short(item['input'])}")
    return lines


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def check_length(field: str, prompt_tokens: int, limit_field: str, new_tokens: int, context: int) -> None:
    """Refuse what does not fit the model's context; nothing is ever cut silently.

    Raises:
        InvalidRequestError: naming the field, its value and the limit.
    """
    if prompt_tokens == 0:
        raise InvalidRequestError(f"{field}: at least one token is required, got an empty prompt", field)
    if prompt_tokens >= context:
        raise InvalidRequestError(
            f"{field}: {prompt_tokens} tokens do not fit; this model's context is {context} tokens, of which "
            f"a prompt may take {context - 1}",
            field,
        )
    if prompt_tokens + new_tokens > context:
        raise InvalidRequestError(
            f"{limit_field}: {new_tokens} new tokens after a prompt of {prompt_tokens} exceed this model's "
            f"context of {context} tokens; at most {context - prompt_tokens} are possible",
            limit_field,
        )


def raise_unless_complete(finished: protocol.Finished) -> None:
    """Turn an unhappy end into the exception that says so.

    Raises:
        EngineError: the kind that fits the reason, with the core's own message.
    """
    match finished.reason:
        case "stop" | "length":
            return
        case "invalid":
            raise InvalidRequestError(finished.message)
        case "timeout":
            raise RequestTimeoutError(finished.message or "the request ran longer than request_timeout_s")
        case "cancelled":
            raise RequestCancelledError(finished.message or "the request was cancelled")
        case _:
            raise RequestFailedError(finished.message or "the engine failed")


class StopStrings:
    """Cuts a stream of text before the first stop string, holding back what might be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that can be shown now. Once a stop string is complete, :attr:`stopped` is set."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = self._possible_start()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back, when the answer ended by itself."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self) -> int:
        for size in range(min(self._longest - 1, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0
