"""OpenAI's own client, streaming and not."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.timeout(300)  # the first test of a session waits until an engine has started

MODEL = "builtin/tiny-llama"


def complete(served: Any, prompt: str, **more: Any) -> Any:
    return served.openai.completions.create(model=MODEL, prompt=prompt, temperature=0, **more)


def test_completion_reports_tokens_and_cached_tokens(served: Any) -> None:
    prompt = (
        "A prompt long enough that several pages of sixteen tokens are full of it, and then a little more. "
        * 3
    )
    first = complete(served, prompt, max_tokens=8)
    again = complete(served, prompt, max_tokens=8)
    assert first.object == "text_completion"
    assert first.choices[0].finish_reason == "length"
    assert first.usage.prompt_tokens == len(prompt)
    assert first.usage.completion_tokens == 8
    assert first.usage.total_tokens == len(prompt) + 8
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == (len(prompt) - 1) // 16 * 16
    assert again.choices[0].text == first.choices[0].text
    assert len(first.choices[0].text) == 8


def test_streamed_completion_equals_the_whole_one(served: Any) -> None:
    whole = complete(served, "Once upon a time", max_tokens=24)
    chunks = list(
        complete(
            served, "Once upon a time", max_tokens=24, stream=True, stream_options={"include_usage": True}
        )
    )
    *text_chunks, usage = chunks
    assert "".join(chunk.choices[0].text for chunk in text_chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in text_chunks[:-1]] == [None] * (len(text_chunks) - 1)
    assert text_chunks[-1].choices[0].finish_reason == "length"
    assert usage.choices == []
    assert usage.usage.completion_tokens == 24
    assert usage.usage.prompt_tokens_details.cached_tokens == 0
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(text_chunks) > 4, "tokens came in one piece, not as a stream"


def test_stream_without_usage_option_has_none(served: Any) -> None:
    chunks = list(complete(served, "No usage", max_tokens=3, stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


MESSAGES: list[Any] = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "something."}]},
]


def test_streamed_chat_equals_the_whole_one(served: Any) -> None:
    whole = served.openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=20, temperature=0
    )
    assert whole.object == "chat.completion"
    assert whole.choices[0].message.role == "assistant"
    assert len(whole.choices[0].message.content) == whole.usage.completion_tokens == 20
    chunks = list(
        served.openai.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=20, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert content == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_next_turn_of_a_chat_hits_the_pages_of_the_last_answer(served: Any) -> None:
    question = [{"role": "user", "content": "First question, long enough for a few pages of tokens. " * 3}]
    answer = served.openai.chat.completions.create(
        model=MODEL, messages=question, max_tokens=64, temperature=0
    )
    turns = [*question, {"role": "assistant", "content": answer.choices[0].message.content}]
    turns.append({"role": "user", "content": "And then?"})
    second = served.openai.chat.completions.create(model=MODEL, messages=turns, max_tokens=4, temperature=0)
    whole_pages = (answer.usage.prompt_tokens + 63) // 16 * 16
    assert second.usage.prompt_tokens_details.cached_tokens >= whole_pages - 16


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_answer_before_it(served: Any, stream: bool) -> None:
    whole = complete(served, "Tell me more", max_tokens=48).choices[0].text
    stop = whole[20:23]
    expected = whole[: whole.index(stop)]
    answer = complete(served, "Tell me more", max_tokens=48, stop=["\x00never", stop], stream=stream)
    if stream:
        chunks = list(answer)
        text, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert text == expected
    assert reason == "stop"


def test_seed_repeats_a_sampled_answer(served: Any) -> None:
    def sampled(seed: int) -> str:
        text = served.openai.completions.create(
            model=MODEL, prompt="Dice", max_tokens=24, temperature=1.5, top_p=0.95, seed=seed
        )
        return str(text.choices[0].text)

    assert sampled(7) == sampled(7)
    assert len({sampled(seed) for seed in range(5)}) > 1


def test_prompt_can_be_token_ids(served: Any) -> None:
    as_text = complete(served, "ids", max_tokens=4)
    as_ids = served.openai.completions.create(model=MODEL, prompt=list(b"ids"), temperature=0, max_tokens=4)
    assert as_ids.choices[0].text == as_text.choices[0].text


def test_extension_fields_are_accepted_in_extra_body(served: Any) -> None:
    answer = complete(
        served,
        "Extended",
        max_tokens=2,
        user="u",
        extra_body={"priority": 5, "session_id": "s-1", "exact_only": True},
        extra_headers={"x-session-id": "s-2"},
    )
    assert answer.usage.completion_tokens == 2


def test_served_model_is_listed(served: Any) -> None:
    assert [model.id for model in served.openai.models.list()] == [MODEL]
    assert served.openai.models.retrieve(MODEL).owned_by == "kvpilot"
    with pytest.raises(
        openai.NotFoundError, match=r"model: 'gpt-9' does not exist, must be 'builtin/tiny-llama'"
    ):
        served.openai.models.retrieve("gpt-9")


async def test_forty_streams_at_once_each_get_their_own_answer(served: Any) -> None:
    client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    prompts = [f"Prompt number {i}" for i in range(40)]

    async def streamed(prompt: str) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=12, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    texts = await asyncio.gather(*map(streamed, prompts))
    await client.close()
    assert [len(text) for text in texts] == [12] * 40
    alone = complete(served, prompts[17], max_tokens=12).choices[0].text
    assert texts[17] == alone
