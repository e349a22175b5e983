"""Invalid input over HTTP: status, OpenAI's error shape, and a line that names field, value and limit."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.timeout(300)  # the first test of a session waits until an engine has started

CHAT = [{"role": "user", "content": "hi"}]


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "prompt: required"),
        ({"prompt": ""}, "prompt", "prompt: at least one token is required"),
        ({"prompt": 5}, "prompt", "prompt: must be a string or a list of token ids, got 5"),
        ({"prompt": ["a", "b"]}, "prompt", "prompt: must be one prompt, got a list of 2"),
        ({"prompt": [1, 99999]}, "prompt", "prompt: token ids must lie between 0 and"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "should be greater than or equal to 1, got 0"),
        ({"prompt": "a", "temperature": 3}, "temperature", "should be less than or equal to 2, got 3"),
        ({"prompt": "a", "top_p": 0}, "top_p", "top_p: should be greater than 0, got 0"),
        ({"prompt": "a", "seed": "x"}, "seed", "seed: should be a valid integer, got 'x'"),
        ({"prompt": "a", "stop": 5}, "stop", "stop: must be a string or at most 4 strings, got 5"),
        ({"prompt": "a", "stop": ["1", "2", "3", "4", "5"]}, "stop", "at most 4 strings"),
        ({"prompt": "a", "stop": [""]}, "stop", "each stop string must have 1 to 256 characters"),
        ({"prompt": "a", "n": 2}, "n", "n: not supported, must be null or 1, got 2"),
        ({"prompt": "a", "best_of": 3}, "best_of", "best_of: not supported, must be null or 1, got 3"),
        ({"prompt": "a", "n": True}, "n", "n: not supported, must be null or 1, got True"),
        ({"prompt": "a", "logprobs": 1}, "logprobs", "logprobs: not supported"),
        ({"prompt": "a", "logprobs": 0}, "logprobs", "logprobs: not supported, must be null or false, got 0"),
        ({"prompt": "a", "echo": True}, "echo", "echo: not supported, must be null or false, got True"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "presence_penalty: not supported"),
        ({"prompt": "a", "bogus": 1}, "bogus", "bogus: unknown parameter"),
        ({"prompt": "a", "stream_options": {}}, "stream_options", "allowed with stream=true only"),
        ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options", "stream_options.x"),
        ({"prompt": "a", "priority": "high"}, "priority", "priority: should be a valid integer"),
        ({"prompt": "a", "max_tokens": 10**6}, "max_tokens", "exceed this model's context of"),
        ({"prompt": "a" * 40_000}, "prompt", "40000 tokens do not fit; this model's context is 32768"),
        ({"prompt": "a" * 20_000}, None, "the cache holds 16384 (the engine's max_tokens)"),
    ],
)  # fmt: skip
def test_invalid_completion_is_a_400_that_names_field_and_value(
    served: Any, body: dict[str, Any], param: str | None, message: str
) -> None:
    error = error_of(served.http.post("/v1/completions", json=body), 400)
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": []}, "messages", "messages: list should have at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages", "messages.0.content"),
        ({"messages": [{"role": "user"}]}, "messages", "messages.0.content: must be a string or text parts"),
        ({"messages": [{"role": "system", "content": None}]}, "messages", "messages.0.content: must be"),
        ({"messages": [{"role": "assistant", "content": []}]}, "messages", "messages.0.content: must be"),
        ({"messages": [{**CHAT[0], "bogus": 1}]}, "messages", "messages.0.bogus: unknown parameter"),
        ({"messages": [{**CHAT[0], "tool_calls": [{}]}]}, "messages", "messages.0.tool_calls: not supported"),
        ({"messages": CHAT, "tools": [{"type": "function"}]}, "tools", "must be null or []"),
        ({"messages": CHAT, "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"messages": CHAT, "logprobs": True}, "logprobs", "logprobs: not supported"),
        ({"messages": CHAT, "max_completion_tokens": -1}, "max_completion_tokens", "or equal to 1"),
    ],
)  # fmt: skip
def test_invalid_chat_is_a_400_that_names_field_and_value(
    served: Any, body: dict[str, Any], param: str | None, message: str
) -> None:
    error = error_of(served.http.post("/v1/chat/completions", json=body), 400)
    assert message in error["message"]
    assert error["param"] == param


def test_neutral_values_of_unsupported_parameters_are_accepted(served: Any) -> None:
    neutral = {
        "n": 1,
        "logprobs": None,
        "presence_penalty": 0,
        "tools": [],
        "response_format": {"type": "text"},
        "stream": True,
        "stream_options": {"include_obfuscation": False},
    }
    answered = {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": []}
    body = {"messages": [*CHAT, answered, {**CHAT[0], "name": "Ann"}], "max_tokens": 1, **neutral}
    answer = served.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


def test_body_that_is_not_json_is_400(served: Any) -> None:
    error = error_of(served.http.post("/v1/completions", content=b"{not json"), 400)
    assert error["message"].startswith("body: invalid JSON")


def test_unknown_model_is_404(served: Any) -> None:
    error = error_of(served.http.post("/v1/completions", json={"model": "gpt-9", "prompt": "a"}), 404)
    assert error["code"] == "model_not_found"
    assert "must be 'builtin/tiny-llama'" in error["message"]


def test_unknown_path_is_404_and_wrong_method_is_405(served: Any) -> None:
    assert error_of(served.http.get("/v2/completions"), 404)["message"] == "unknown path: GET /v2/completions"
    assert "method GET is not allowed" in error_of(served.http.get("/v1/completions"), 405)["message"]
    assert "method DELETE is not allowed" in error_of(served.http.delete("/metrics"), 405)["message"]


@pytest.mark.parametrize("announced", [True, False])
def test_body_beyond_the_limit_is_413(served: Any, announced: bool) -> None:
    big = b'{"prompt": "' + b"a" * (8 * 1024 * 1024) + b'"}'
    with httpx.Client(base_url=served.url, timeout=30.0) as client:
        answer = client.post("/v1/completions", content=big if announced else iter([big[:-1], big[-1:]]))
    assert "at most 8388608 bytes" in error_of(answer, 413)["message"]


def test_stream_that_cannot_start_is_an_http_error(served: Any) -> None:
    answer = served.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 10**6, "stream": True})
    assert error_of(answer, 400)["param"] == "max_tokens"


def test_invalid_requests_are_counted_as_invalid(served: Any) -> None:
    before = served.metric("kvpilot_requests_total", outcome="invalid")
    served.http.post("/v1/completions", json={"prompt": "a", "n": 2})
    assert served.metric("kvpilot_requests_total", outcome="invalid") == before + 1
