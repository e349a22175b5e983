"""Recorded traffic, replayed at its arrival times: Mooncake (JSON lines) and Azure (CSV).

Mooncake (https://github.com/kvcache-ai/Mooncake): ``timestamp`` (ms), ``input_length``, ``output_length``
and ``hash_ids``, one per block of 512 tokens; equal id prefixes mean equal prompt prefixes.
Azure LLM inference trace 2023: ``TIMESTAMP,ContextTokens,GeneratedTokens``; prompts share no prefix.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvpilot_operator.load.text import text_of
from kvpilot_operator.load.workload import Arrival, LoadError, LoadFeedback, LoadRequest

TRACE_BLOCK_TOKENS = 512
"""Tokens per hash id of a Mooncake trace."""

MAX_TIMESTAMP_MS, MAX_TOKENS = 1e15, 10_000_000
"""Larger values are errors: a timestamp in another unit, or a length that no request has."""

_AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


@dataclass(frozen=True)
class TraceRequest:
    """One request: ``at`` in s from the first one, lengths in tokens, ``blocks`` the hash ids if any."""

    at: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def read_trace(path: Path, *, ordered: bool = False) -> list[TraceRequest]:
    """All requests of a trace in order of arrival; the first line decides the format.

    Args:
        ordered: refuse a trace whose lines are not in order of arrival, instead of sorting them.

    Raises:
        LoadError: the file or a line is invalid; names file, line and field.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte-order mark before CSV
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(
            f"trace {path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise LoadError(f"trace {path}: is empty")
    number, first = lines[0]
    if first.lstrip().startswith("{"):
        requests = [_mooncake(f"trace {path}:{number}", line) for number, line in lines]
        numbers = [number for number, _ in lines]
    elif _columns(f"trace {path}:{number}", first) == _AZURE_HEADER:
        requests = [_azure(f"trace {path}:{number}", line) for number, line in lines[1:]]
        numbers = [number for number, _ in lines[1:]]
    else:
        raise LoadError(
            f"trace {path}:{number}: must be a JSON object (Mooncake) or the header "
            f"{','.join(_AZURE_HEADER)} (Azure), got {first[:60]!r}"
        )
    if not requests:
        raise LoadError(f"trace {path}: contains no request")
    if ordered:
        _check_order(path, requests, numbers)
    requests.sort(key=lambda request: request.at)
    start = requests[0].at
    return [TraceRequest(r.at - start, r.input_tokens, r.output_tokens, r.blocks) for r in requests]


def _check_order(path: Path, requests: list[TraceRequest], numbers: list[int]) -> None:
    for (before, after), number in zip(pairwise(requests), numbers[1:], strict=True):
        if after.at < before.at:
            raise LoadError(
                f"trace {path}:{number}: arrives {before.at - after.at:g} s before the request of the line "
                f"above; a trace must be in order of arrival"
            )


def _mooncake(where: str, line: str) -> TraceRequest:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise LoadError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # too many digits or nested brackets
        raise LoadError(f"{where}: cannot be read as JSON: {error}") from None
    if not isinstance(row, dict):
        raise LoadError(f"{where}: must be a JSON object, got {line[:60]!r}")
    at = _number(where, "timestamp", row.get("timestamp"), 0, MAX_TIMESTAMP_MS)
    length = int(_number(where, "input_length", row.get("input_length"), 1, MAX_TOKENS, whole=True))
    output = int(_number(where, "output_length", row.get("output_length"), 1, MAX_TOKENS, whole=True))
    blocks = row.get("hash_ids")
    needed = -(-length // TRACE_BLOCK_TOKENS)
    if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
        raise LoadError(f"{where}: hash_ids: must be a list of whole numbers, got {_short(blocks)}")
    if len(blocks) != needed:
        raise LoadError(
            f"{where}: hash_ids: must hold {needed} ids for input_length {length} "
            f"({TRACE_BLOCK_TOKENS} tokens each), got {len(blocks)}"
        )
    return TraceRequest(at / 1000, length, output, tuple(blocks))


def _azure(where: str, line: str) -> TraceRequest:
    row = _columns(where, line)
    if len(row) != len(_AZURE_HEADER):
        raise LoadError(f"{where}: must have {len(_AZURE_HEADER)} columns, got {len(row)}: {line[:60]!r}")
    try:
        at = datetime.fromisoformat(row[0]).timestamp()
    except (ValueError, OverflowError):
        raise LoadError(
            f"{where}: TIMESTAMP: must be a date and time (ISO 8601), got {_short(row[0])}"
        ) from None
    lengths = []
    for name, text in zip(_AZURE_HEADER[1:], row[1:], strict=True):
        # More than 20 digits are above MAX_TOKENS in any case, and int() refuses thousands of them.
        value = int(text) if text.strip().isdecimal() and len(text) <= 20 else text
        lengths.append(int(_number(where, name, value, 1, MAX_TOKENS, whole=True)))
    return TraceRequest(at, lengths[0], lengths[1])


def _columns(where: str, line: str) -> list[str]:
    try:
        return next(csv.reader([line]))
    except csv.Error as error:
        raise LoadError(f"{where}: not CSV: {error}") from None


def _number(
    where: str, name: str, value: Any, at_least: float, at_most: float, *, whole: bool = False
) -> float:
    numeric = type(value) is int or (type(value) is float and not whole)
    if numeric and at_least <= value <= at_most:  # exact for large ints, False for NaN
        return float(value)
    kind = "a whole number" if whole else "a number"
    raise LoadError(f"{where}: {name}: must be {kind} from {at_least:g} to {at_most:g}, got {_short(value)}")


def _short(value: Any) -> str:
    """The value for a message, at most 60 characters."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def prompt_of(request: TraceRequest, shrink: int, unique: str) -> str:
    """The prompt of a request: equal hash ids become equal blocks of ``512 / shrink`` tokens.

    Args:
        unique: key of the text, for a request without hash ids.
    """
    if not request.blocks:
        return text_of(f"request {unique}", max(1, -(-request.input_tokens // shrink)))
    size = TRACE_BLOCK_TOKENS // shrink
    last = request.input_tokens - TRACE_BLOCK_TOKENS * (len(request.blocks) - 1)
    whole = "".join(text_of(f"block {block}", size) for block in request.blocks[:-1])
    return whole + text_of(f"block {request.blocks[-1]}", -(-last // shrink))


class TraceWorkload:
    """A trace replayed ``speed`` times as fast, with all lengths divided by ``shrink``.

    Args:
        shrink: 1, 2, 4, ... 512; 32 makes one trace block one page of 16 tokens.
        seconds: stop sending after this long; None replays all of it.

    Raises:
        LoadError: a value is out of bounds, or the trace is invalid.
    """

    def __init__(
        self, path: Path, *, speed: float = 1.0, shrink: int = 1, seconds: float | None = None
    ) -> None:
        if not speed > 0:
            raise LoadError(f"speed: must be above 0, got {speed:g}")
        if shrink < 1 or TRACE_BLOCK_TOKENS % shrink:
            raise LoadError(f"shrink: must divide {TRACE_BLOCK_TOKENS}, got {shrink}")
        if seconds is not None and not seconds > 0:
            raise LoadError(f"duration: must be above 0, got {seconds:g}")
        self._requests = read_trace(path)
        self._speed, self._shrink, self._name = speed, shrink, path.name
        length = self._requests[-1].at / speed
        self._seconds = length if seconds is None else min(length, seconds)

    @property
    def title(self) -> str:
        """One line that describes the load."""
        return f"trace {self._name}: speed {self._speed:g}, lengths divided by {self._shrink}"

    @property
    def seconds(self) -> float:
        """How long requests are sent, s."""
        return self._seconds

    @property
    def probes(self) -> tuple[LoadRequest, ...]:
        """No probes: the trace fixes the arrival times."""
        return ()

    def arrivals(self, feedback: LoadFeedback) -> Iterator[Arrival]:
        """The schedule of the trace."""
        for index, request in enumerate(self._requests):
            at = request.at / self._speed
            if at > self._seconds:
                return
            yield Arrival(at, "trace", self._writer(index, request), _ignore)

    def _writer(self, index: int, request: TraceRequest) -> Callable[[], LoadRequest]:
        def write() -> LoadRequest:
            body = {
                "prompt": prompt_of(request, self._shrink, str(index)),
                "max_tokens": max(1, -(-request.output_tokens // self._shrink)),
                "temperature": 0,
            }
            return LoadRequest("/v1/completions", body)

        return write


def _ignore(_: str) -> None:
    """The next request of a trace does not contain the last answer."""
