"""The tokenizer: inverses, streaming, chat, and a front process without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot_engine.frontend.tokenizer import (
    ByteTokenizer,
    TokenizerError,
    load_tokenizer,
)
from kvpilot_engine.model.vocabulary import BYTE_VOCAB_SIZE, GENERATED_IDS, ROLE_IDS

BYTES = ByteTokenizer()


@given(st.text())
def test_decoding_inverts_encoding(text: str) -> None:
    ids = BYTES.encode(text)
    assert BYTES.decode(ids) == text
    assert all(0 <= i < BYTE_VOCAB_SIZE for i in ids)


@given(st.lists(st.sampled_from(GENERATED_IDS)))
def test_generated_ids_survive_decoding_and_encoding(ids: list[int]) -> None:
    assert BYTES.encode(BYTES.decode(ids)) == ids


@given(st.text(), st.integers(1, 5))
def test_streaming_never_splits_a_character(text: str, step: int) -> None:
    ids = BYTES.encode(text)
    stream = BYTES.stream_decoder()
    parts = [stream.push(ids[i : i + step]) for i in range(0, len(ids), step)]
    assert "".join(parts) + stream.finish() == text
    assert not any("\ufffd" in part for part in parts) or "\ufffd" in text


def test_lone_surrogate_is_refused_with_its_place() -> None:
    with pytest.raises(TokenizerError, match="not valid Unicode at character 1"):
        BYTES.encode("a\ud800")


def test_later_turn_keeps_the_ids_of_earlier_turns() -> None:
    first = BYTES.apply_chat_template([{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}])
    second = BYTES.apply_chat_template(
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "yo"},
            {"role": "user", "content": "more"},
        ]
    )
    assert second[: len(first)] == first
    assert first[-1] == ROLE_IDS["assistant"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages: at least one is required"),
        ([{"role": "wizard", "content": ""}], r"messages\.0\.role: must be one of .*, got 'wizard'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\.0\.content: must be a string"),
    ],
)
def test_invalid_chat_is_refused_by_message(messages: list[dict[str, object]], reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason):
        BYTES.apply_chat_template(messages)


def test_special_tokens_in_a_text_are_plain_text() -> None:
    assert max(BYTES.encode("<|user|><eos>")) < 256


def test_directory_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({c: i for i, c in enumerate([*vocabulary, "<eos>"])}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<eos>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "eos_token": "<eos>",
                "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
                "{% endfor %}",
            }
        )
    )
    tokenizer = load_tokenizer(str(tmp_path))
    text = "héllo ✓\n"
    ids = tokenizer.encode(text)
    stream = tokenizer.stream_decoder()
    assert "".join(stream.push([i]) for i in ids) + stream.finish() == text == tokenizer.decode(ids)
    assert tokenizer.eos_ids == (256,)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert chat == [*tokenizer.encode("user: x"), 256]


def test_missing_model_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(TokenizerError, match="must be builtin/tiny-llama"):
        load_tokenizer("nowhere/at-all")


def test_front_does_not_import_torch() -> None:
    code = (
        "import sys; from kvpilot_engine.frontend.tokenizer import load_tokenizer;"
        "load_tokenizer('builtin/tiny-llama').encode('x'); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "False"
