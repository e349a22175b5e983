"""Bodies of the two generating endpoints. Unsupported parameters are refused, not ignored."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from kvpilot_engine.frontend.completion import DEFAULT_NEW_TOKENS, Prompt, RequestFields
from kvpilot_engine.server.errors import ApiError, validation_error

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,),
    "top_logprobs": (0,), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "store": (False,),
    "service_tier": ("auto", "default"), "parallel_tool_calls": (True, False),
    "audio": (), "metadata": (), "prediction": (), "reasoning_effort": (), "verbosity": (),
    "web_search_options": (), "prompt_cache_key": (), "safety_identifier": (),
}  # fmt: skip
"""Parameters of OpenAI's API without support here, each with the values that ask for nothing."""


def _stop(value: Any) -> Any:
    """Accept one string or a list; anything else gets one error, not one for each form."""
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) for s in stops):
        raise ValueError(f"must be a string or at most {MAX_STOPS} strings")
    if any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(f"each stop string must have 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(stops)


def _prompt(value: Any) -> Any:
    """Accept text or token ids, and a list that holds exactly one prompt."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return value
    if isinstance(value, list) and len(value) > 1 and isinstance(value[0], str | list):
        raise ValueError(f"must be one prompt, got a list of {len(value)}; send one request for each")
    raise ValueError("must be a string or a list of token ids")


class StreamOptions(BaseModel):
    """``stream_options``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = Field(None, description="No chunk is ever padded.")


class _Request(RequestFields):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Request):
    """Body of ``POST /v1/completions``."""

    prompt: Annotated[str | list[int], BeforeValidator(_prompt)]

    def to_prompt(self) -> Prompt:
        """The prompt; 16 new tokens are OpenAI's default."""
        limit = DEFAULT_NEW_TOKENS if self.max_tokens is None else self.max_tokens
        return Prompt(self.prompt, "prompt", limit, "max_tokens")


def _nothing(value: Any) -> None:
    if value not in (None, []):
        raise ValueError("not supported, must be null or []")


Nothing = Annotated[None, BeforeValidator(_nothing)]
"""A field that OpenAI's answers carry and clients send back; here it is always empty."""


class Message(BaseModel):
    """One turn of a chat; the content is text or a list of text parts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = Field(None, validate_default=True)
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Nothing = None
    function_call: Nothing = None
    refusal: Nothing = None
    audio: Nothing = None
    annotations: Nothing = None

    @field_validator("content")
    @classmethod
    def _content_is_given(cls, content: Any, info: ValidationInfo) -> Any:
        if content == [] or (content is None and info.data.get("role") != "assistant"):
            raise ValueError("must be a string or text parts")
        return content


class ChatRequest(_Request):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def to_prompt(self) -> Prompt:
        """The turns; without a limit the answer may fill the context."""
        turns = tuple(message.model_dump(exclude_none=True) for message in self.messages)
        if self.max_completion_tokens is None:
            return Prompt(turns, "messages", self.max_tokens, "max_tokens")
        return Prompt(turns, "messages", self.max_completion_tokens, "max_completion_tokens")


def parse(kind: type[CompletionRequest] | type[ChatRequest], body: bytes) -> CompletionRequest | ChatRequest:
    """The validated body.

    Raises:
        ApiError: 400, naming the field, its value and what is allowed.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise validation_error(error) from None
    for name, value in (request.model_extra or {}).items():
        _refuse_unless_neutral(name, value)
    if request.stream_options is not None and not request.stream:
        raise ApiError(
            HTTPStatus.BAD_REQUEST, "stream_options: allowed with stream=true only", param="stream_options"
        )
    return request


def _refuse_unless_neutral(name: str, value: Any) -> None:
    if name not in NEUTRAL:
        raise ApiError(
            HTTPStatus.BAD_REQUEST, f"{name}: unknown parameter", param=name, code="unknown_parameter"
        )
    if value is None or any(
        value == neutral and isinstance(value, bool) is isinstance(neutral, bool)  # 1 == True
        for neutral in NEUTRAL[name]
    ):
        return
    allowed = " or ".join(json.dumps(neutral) for neutral in (None, *NEUTRAL[name]))
    raise ApiError(
        HTTPStatus.BAD_REQUEST,
        f"{name}: not supported, must be {allowed}, got {value!r:.80}",
        param=name,
        code="unsupported_parameter",
    )
