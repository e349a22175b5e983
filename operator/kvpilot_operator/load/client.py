"""HTTP client with little CPU time per request: the generator often shares the machine with the server."""

from __future__ import annotations

import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp
import msgspec
from aiohttp.http_exceptions import HttpProcessingError

from kvpilot_operator.load.workload import LoadError, LoadRequest


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    message: _Message | None = None
    delta: _Message | None = None

    @property
    def content(self) -> str:
        """The text of a completion, a chat message or a part of one."""
        part = self.message or self.delta
        return (self.text if part is None else part.content) or ""


class _Failure(msgspec.Struct):
    message: str = ""


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Failure | None = None


_answers = msgspec.json.Decoder(_Answer)
_encoder = msgspec.json.Encoder()

_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError)
"""Errors of decoding bytes that are not UTF-8, not JSON, or not the expected JSON."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer; ``first_token_at`` is on the monotonic clock, s, and None unless the answer was streamed."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    first_token_at: float | None = None


class RequestError(Exception):
    """A request without a complete answer; ``kind`` is a key of ``results.ERROR_KINDS``."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Client:
    """Sends requests to one OpenAI-compatible server; an async context manager.

    Args:
        url: base URL of the server, with or without ``/v1``.
        stream: request server-sent events and measure the time to the first token.
        timeout_s: limit for one whole request.

    Raises:
        LoadError: the URL or the timeout is invalid.
    """

    def __init__(self, url: str, *, stream: bool = False, timeout_s: float = 120.0) -> None:
        if not _is_server(url):
            raise LoadError(
                f"URL: must be http:// or https:// with a host, port and path at most, got {url!r}"
            )
        if not timeout_s > 0:
            raise LoadError(f"timeout: must be above 0, got {timeout_s:g}")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._stream = stream
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._model = ""
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Content-Type": "application/json"},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def find_model(self) -> str:
        """Read the first model that the server lists; later requests name it.

        Raises:
            RequestError: the server cannot be reached or lists no model.
        """
        assert self._session is not None
        url = f"{self._url}/v1/models"
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=10)) as response:
                body = msgspec.json.decode(await response.read())
                self._model = str(body["data"][0]["id"])
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise RequestError("connection", f"cannot reach {url}: {error or 'no answer'}") from error
        except (*_UNREADABLE, KeyError, IndexError, TypeError) as error:
            raise RequestError("protocol", f"{url} lists no model") from error
        return self._model

    async def send(self, request: LoadRequest) -> Answer:
        """Send one request and read its whole answer.

        Raises:
            RequestError: the request failed; the message is one line.
        """
        assert self._session is not None
        body = {"model": self._model, **request.body}
        if self._stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            async with self._session.post(
                f"{self._url}{request.path}", data=_encoder.encode(body)
            ) as response:
                if response.status != 200:
                    raise _refusal(response.status, await response.read())
                if self._stream:
                    return await _read_stream(response)
                return _answer(await response.read())
        except TimeoutError as error:
            raise RequestError("timeout", f"no answer within {self._timeout.total:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise RequestError("connection", str(error) or type(error).__name__) from error


def _is_server(url: str) -> bool:
    try:
        parsed = urlsplit(url)
        # urlsplit validates the port only when it is read.
        numbered = parsed.port != 0
    except ValueError:
        return False
    blank = any(character.isspace() for character in url)
    whole = bool(parsed.hostname) and not parsed.query and not parsed.fragment
    return parsed.scheme in {"http", "https"} and numbered and whole and not blank


def _refusal(status: int, body: bytes) -> RequestError:
    kind = "shed" if status == 429 else "refused" if status < 500 else "server"
    try:
        failure = _answers.decode(body).error
        message = failure.message if failure is not None else body[:200].decode(errors="replace")
    except _UNREADABLE:
        message = body[:200].decode(errors="replace")
    return RequestError(kind, f"{status}: {message}")


def _answer(body: bytes) -> Answer:
    try:
        answer = _answers.decode(body)
    except _UNREADABLE as error:
        raise RequestError("protocol", f"not an answer of the OpenAI API: {error}") from error
    return _whole(answer.choices[0].content if answer.choices else "", answer.usage, None)


async def _read_stream(response: aiohttp.ClientResponse) -> Answer:
    text: list[str] = []
    usage: _Usage | None = None
    first: float | None = None
    try:
        async for line in response.content:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return _whole("".join(text), usage, first)
            part = _answers.decode(data)
            if part.error is not None:
                raise RequestError("server", part.error.message)
            usage = part.usage or usage
            content = part.choices[0].content if part.choices else ""
            if content and first is None:
                first = time.monotonic()
            text.append(content)
    # For a line that is too long aiohttp raises one of the last two, depending on its version.
    except (*_UNREADABLE, HttpProcessingError, ValueError) as error:
        raise RequestError("protocol", f"not an event of the OpenAI API: {error}") from error
    raise RequestError("protocol", "the stream ended without [DONE]")


def _whole(text: str, usage: _Usage | None, first: float | None) -> Answer:
    used = usage or _Usage()
    details = used.prompt_tokens_details
    cached = details.cached_tokens if details is not None else 0
    return Answer(text, used.prompt_tokens, cached, used.completion_tokens, first)
