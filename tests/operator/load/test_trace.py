"""Traces: format detection by content, errors with line and field, equal blocks as equal pages."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpilot_engine.frontend.tokenizer import load_tokenizer
from kvpilot_operator.cli import app
from kvpilot_operator.load.command import CHAT_OPTIONS
from kvpilot_operator.load.results import Tally
from kvpilot_operator.load.trace import TraceRequest, TraceWorkload, prompt_of, read_trace
from kvpilot_operator.load.workload import LoadError

GOOD = '{"timestamp": 0, "input_length": 700, "output_length": 64, "hash_ids": [7, 8]}\n'
TRACES = os.environ.get("KVPILOT_TRACES")
"""Directory of the public traces, which are not part of this repository."""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: not JSON"),
        ("[1]", ":2: must be a JSON object, got '[1]'"),
        (
            '{"timestamp": -1, "input_length": 1, "output_length": 1, "hash_ids": [1]}',
            ":2: timestamp: must be a number from 0 to 1e+15, got -1",
        ),
        (
            '{"timestamp": 1, "input_length": 0.5, "output_length": 1, "hash_ids": [1]}',
            ":2: input_length: must be a whole number from 1 to 1e+07, got 0.5",
        ),
        (
            '{"timestamp": 1, "input_length": 1, "hash_ids": [1]}',
            ":2: output_length: must be a whole number from 1 to 1e+07, got nothing",
        ),
        (
            '{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": "x"}',
            ":2: hash_ids: must be a list of whole numbers, got 'x'",
        ),
        (
            '{"timestamp": 1, "input_length": 513, "output_length": 1, "hash_ids": [1]}',
            ":2: hash_ids: must hold 2 ids for input_length 513 (512 tokens each), got 1",
        ),
        (
            f'{{"timestamp": {"9" * 401}, "input_length": 1, "output_length": 1, "hash_ids": [1]}}',
            f":2: timestamp: must be a number from 0 to 1e+15, got {'9' * 60}...",
        ),
        (f'{{"timestamp": {"9" * 5000}}}', ":2: cannot be read as JSON: Exceeds the limit"),
        ("[" * 100_000, ":2: cannot be read as JSON: maximum recursion depth exceeded"),
        (
            '{"timestamp": NaN, "input_length": 1, "output_length": 1, "hash_ids": [1]}',
            ":2: timestamp: must be a number from 0 to 1e+15, got nan",
        ),
    ],
)
def test_invalid_mooncake_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(LoadError) as reported:
        read_trace(written(tmp_path, GOOD + line + "\n"))
    assert message in str(reported.value)
    assert "\n" not in str(reported.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n",
            ":2: TIMESTAMP: must be a date and time",
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,many,1\n",
            ":2: ContextTokens: must be a whole number from 1 to 1e+07, got 'many'",
        ),
        (
            f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,1,{'9' * 5000}\n",
            f":2: GeneratedTokens: must be a whole number from 1 to 1e+07, got '{'9' * 59}...",
        ),
        (f"TIMESTAMP,ContextTokens,GeneratedTokens\n{'x' * 200_000},1,1\n", ":2: not CSV: field larger"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,1\n", ":2: must have 3 columns, got 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "contains no request"),
        ("time,tokens\n1,2\n", ":1: must be a JSON object (Mooncake) or the header TIMESTAMP"),
        ("\n", "is empty"),
    ],
)
def test_invalid_csv_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LoadError, match="trace") as reported:
        read_trace(written(tmp_path, text))
    assert message in str(reported.value)


def test_load_refuses_an_invalid_trace_with_exit_code_2(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + "{}\n")
    result = CliRunner().invoke(app, ["load", "http://127.0.0.1:9", "--trace", str(path)])
    assert result.exit_code == 2
    assert f"{path}:2: timestamp: must be a number" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shrink", "3"], "shrink: must divide 512, got 3"),
        (["--speed", "0"], "speed: must be above 0, got 0"),
        (["--duration", "-1"], "duration: must be above 0, got -1"),
        (["--timeout", "0"], "timeout: must be above 0, got 0"),
        (
            ["--json", "/proc/x.json"],
            "--json: cannot be written: No such file or directory, got /proc/x.json",
        ),
    ],
)
def test_load_refuses_invalid_options(tmp_path: Path, options: list[str], message: str) -> None:
    path = written(tmp_path, GOOD)
    result = CliRunner().invoke(app, ["load", "http://127.0.0.1:9", "--trace", str(path), *options])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            (
                ["--trace", "trace", f"--{name.replace('_', '-')}", "4"],
                f"--{name.replace('_', '-')}: cannot go",
            )
            for name in CHAT_OPTIONS
        ),
        (["--speed", "1"], "--speed: needs --trace FILE"),
        (["--shrink", "2"], "--shrink: needs --trace FILE"),
        (["--trace", "trace", "--json", "./trace"], "--json: must be another file than that of --trace"),
    ],
)
def test_load_refuses_options_that_ignore_or_overwrite_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, GOOD)
    result = CliRunner().invoke(app, ["load", "http://127.0.0.1:9", *options])
    assert result.exit_code == 2
    assert result.output.startswith(f"kvpilot load: {message}")
    assert len(result.output.splitlines()) == 1
    assert path.read_text() == GOOD


def test_times_start_at_zero_and_are_sorted(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
    )
    requests = read_trace(written(tmp_path, text))
    assert [(r.input_tokens, r.output_tokens) for r in requests] == [(374, 44), (396, 109)]
    assert [r.at for r in requests] == [0, pytest.approx(4.314579, abs=1e-5)]


@pytest.mark.parametrize(
    "text", [GOOD, "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:50,700,64\n"]
)
def test_byte_order_mark_is_ignored(tmp_path: Path, text: str) -> None:
    (request,) = read_trace(written(tmp_path, f"\ufeff{text}"))
    assert (request.input_tokens, request.output_tokens) == (700, 64)


@pytest.mark.parametrize(
    "url",
    (
        *("notaurl", "localhost:8000", "ftp://x", "http://", "http:///v1"),
        *("http://x:99999", "http://[::1", "http://a b", "http://x?y=1", ""),
    ),
)
def test_load_refuses_an_invalid_url(url: str) -> None:
    result = CliRunner().invoke(app, ["load", url])
    assert result.exit_code == 2
    assert result.output == (
        f"kvpilot load: URL: must be http:// or https:// with a host, port and path at most, got {url!r}\n"
    )


def test_equal_blocks_become_equal_pages() -> None:
    encode = load_tokenizer("builtin/tiny-llama").encode
    one = encode(prompt_of(TraceRequest(0, 1200, 5, (1, 2, 3)), 32, "a"))
    two = encode(prompt_of(TraceRequest(0, 1600, 5, (1, 2, 9, 4)), 32, "b"))
    assert len(one) == 32 + 6  # 1200 - 1024 = 176 tokens of the last block, divided by 32, rounded up
    assert len(two) == 48 + 2
    assert one[:32] == two[:32]
    assert one[32:38] != two[32:38]


def test_speed_and_duration_cut_the_schedule(tmp_path: Path) -> None:
    lines = [GOOD.replace('"timestamp": 0', f'"timestamp": {second * 1000}') for second in range(10)]
    workload = TraceWorkload(written(tmp_path, "".join(lines)), speed=2, shrink=32, seconds=3)
    arrivals = list(workload.arrivals(Tally()))
    assert [a.at for a in arrivals] == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert arrivals[0].request().body["max_tokens"] == 2
    assert workload.seconds == 3
    assert TraceWorkload(written(tmp_path, "".join(lines)), speed=2, seconds=60).seconds == 4.5


@pytest.mark.parametrize(
    ("name", "count"),
    [("mooncake_conversation_first_half.jsonl", 6015), ("azure_llm_2023_conversation.csv", 19366)],
)
def test_public_traces_are_read(name: str, count: int) -> None:
    if TRACES is None:
        pytest.skip(f"{name} is not read: set KVPILOT_TRACES to the directory that contains it")
    requests = read_trace(Path(TRACES) / name)
    assert count - 1 <= len(requests) <= count
    assert all(a.at <= b.at for a, b in itertools.pairwise(requests))
