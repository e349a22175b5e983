"""What HTTP and Python requests have in common: their fields and limits, the text of the answer, its end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from kvpilot_engine.errors import (
    InvalidRequestError,
    RequestCancelledError,
    RequestFailedError,
    RequestTimeoutError,
    RequestTooLargeError,
)
from kvpilot_engine.frontend.tokenizer import Tokenizer
from kvpilot_engine.ipc import messages
from kvpilot_engine.ipc.client import RequestHandle

DEFAULT_NEW_TOKENS = 16
"""New tokens of a completion that does not say how many it wants."""

_PRIORITY_BOUND = 1_000_000
_SEED_BOUND = 2**63
_MAX_SHOWN_CHARACTERS = 80  # of a wrong value that an error repeats

Temperature = Annotated[float, Field(ge=0.0, le=2.0, description="0 is greedy.")]
TopP = Annotated[float, Field(gt=0.0, le=1.0)]


class RequestFields(BaseModel):
    """Fields of a request that HTTP and Python share, with one set of bounds."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: int | None = Field(None, ge=-_SEED_BOUND, lt=_SEED_BOUND)
    priority: int = Field(0, ge=-_PRIORITY_BOUND, le=_PRIORITY_BOUND, description="Higher is more urgent.")
    session_id: str | None = Field(None, max_length=256)
    exact_only: bool = Field(False, description="Use cached pages of exact fidelity only.")


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was given, and the names by which errors refer to it.

    Attributes:
        content: text, token ids, or the turns of a chat.
        field: name of the content's field.
        max_new_tokens: upper bound of new tokens; None for as many as fit behind the prompt.
        limit_field: name of that bound's field.
    """

    content: str | list[int] | tuple[Mapping[str, Any], ...]
    field: str
    max_new_tokens: int | None
    limit_field: str


def fault_lines(error: ValidationError, unknown: str) -> list[str]:
    """One clause for each wrong field of a request: its name, what is allowed, and what was given.

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
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[:_MAX_SHOWN_CHARACTERS]}…"


def check_length(field: str, prompt_tokens: int, limit_field: str, new_tokens: int, context: int) -> None:
    """Refuse a request that does not fit the model's context; a prompt is never truncated.

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


def raise_unless_complete(finished: messages.Finished) -> None:
    """Raise the exception for an end other than ``stop`` and ``length``.

    Raises:
        EngineError: the subclass for the reason, with the core's message.
    """
    match finished.reason:
        case "stop" | "length":
            return
        case "invalid":
            raise InvalidRequestError(finished.message)
        case "too_large":
            raise RequestTooLargeError(finished.message)
        case "timeout":
            raise RequestTimeoutError(finished.message or "the request ran longer than request_timeout_s")
        case "cancelled":
            raise RequestCancelledError(finished.message or "the request was cancelled")
        case _:
            raise RequestFailedError(finished.message or "the engine failed")


class StopStrings:
    """Cuts a stream of text before the first stop string; holds back a tail that may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that can be shown now. :attr:`stopped` is True once a stop string is complete."""
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
        """The text held back, once the answer has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self) -> int:
        for size in range(min(self._longest - 1, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0


class Answer:
    """The text of one request, cut before its first stop string.

    Attributes:
        reason: why it ended, ``stop`` or ``length``; empty before its end.
    """

    def __init__(self, handle: RequestHandle, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.reason = ""
        self._handle = handle
        self._tokenizer = tokenizer
        self._stops = StopStrings(stops)
        self._stoppable = bool(stops)

    @property
    def ending(self) -> bool:
        """True once no token is awaited any more: what comes next comes at once."""
        return self._stops.stopped or self._handle.finished is not None

    async def pieces(self) -> AsyncIterator[str]:
        """The text as its tokens arrive; a piece may be empty.

        Raises:
            EngineError: the request ended otherwise than with ``stop`` or ``length``.
        """
        decoder, stops = self._tokenizer.stream_decoder(), self._stops
        while new := await self._handle.tokens():
            yield stops.push(decoder.push(new))
            if stops.stopped:
                self._handle.stop()
                await self._handle.result()  # the abort is confirmed as `cancelled`: a good end here
                self.reason = "stop"
                return
        self.reason = await self._end()
        yield stops.push(decoder.finish()) + stops.finish()

    async def whole(self) -> str:
        """All of the text, once it is complete.

        Raises:
            EngineError: the request ended otherwise than with ``stop`` or ``length``.
        """
        if self._stoppable:
            return "".join([piece async for piece in self.pieces()])
        self.reason = await self._end()
        return self._tokenizer.decode(self._handle.ids)

    async def _end(self) -> str:
        finished = await self._handle.result()
        raise_unless_complete(finished)
        return finished.reason
