"""Text to token ids and back, without torch.

A built-in model uses :class:`ByteTokenizer`: ids 0 to 255 are the bytes of UTF-8, the special ids follow. It
encodes every text without loss: ``decode(encode(text)) == text``. The model generates only printable ASCII
and newlines (the runner masks every other logit), so ``encode(decode(ids)) == ids`` holds for its answers
too, and the next turn of a chat hits the pages of the last one.

A local model directory uses its ``tokenizer.json`` and chat template.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from kvpilot_engine.model.vocabulary import (
    BOS_ID,
    BUILTIN_PREFIX,
    BYTE_VOCAB_SIZE,
    END_OF_TURN_ID,
    EOS_ID,
    PAD_ID,
    ROLE_IDS,
)


class TokenizerError(ValueError):
    """The text or the chat cannot be encoded, or the model has no usable tokenizer; the text is one line."""


class StreamDecoder(Protocol):
    """Turns ids into text as they arrive, holding back the bytes of an unfinished character."""

    def push(self, ids: Sequence[int]) -> str:
        """Text that is complete with these ids; may be empty."""

    def finish(self) -> str:
        """The text held back; bytes of an incomplete character become U+FFFD."""


class Tokenizer(Protocol):
    """Tokenizer of one model."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, specials included."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text. Raises TokenizerError for text that is not valid Unicode."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; specials have none."""

    def stream_decoder(self) -> StreamDecoder:
        """A fresh incremental decoder for one answer."""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a chat, up to where the assistant's next answer begins.

        Args:
            messages: mappings with ``role`` and ``content`` (a string, or ``{"type": "text"}`` parts).

        Raises:
            TokenizerError: naming the message and its fault.
        """


def message_text(index: int, message: Mapping[str, Any]) -> str:
    """The text of one chat message.

    Raises:
        TokenizerError: for content that is not text.
    """
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, Sequence) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    raise TokenizerError(f"messages.{index}.content: must be a string or text parts, got {content!r:.60}")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"text: not valid Unicode at character {error.start}") from None


class _ByteStream:
    """Incremental UTF-8 over byte ids."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(bytes(i for i in ids if i < PAD_ID))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """Tokenizer of the built-in models: one id for each byte, for the reasons given above."""

    vocab_size = BYTE_VOCAB_SIZE
    eos_ids = (EOS_ID, END_OF_TURN_ID)

    def encode(self, text: str) -> list[int]:
        """Bytes of the text; special ids are neither added nor recognised."""
        return list(_utf8(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the byte ids; specials have none."""
        return bytes(i for i in ids if i < PAD_ID).decode(errors="replace")

    def stream_decoder(self) -> StreamDecoder:
        """A fresh incremental decoder."""
        return _ByteStream()

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """``bos (role content end)* assistant``: later turns do not change the ids of earlier ones."""
        if not messages:
            raise TokenizerError("messages: at least one is required")
        ids = [BOS_ID]
        for index, message in enumerate(messages):
            role = message.get("role")
            if role == "developer":
                role = "system"
            if role not in ROLE_IDS:
                raise TokenizerError(
                    f"messages.{index}.role: must be one of {', '.join(ROLE_IDS)}, got {role!r}"
                )
            ids += [ROLE_IDS[role], *self.encode(message_text(index, message)), END_OF_TURN_ID]
        return [*ids, ROLE_IDS["assistant"]]


class _FileStream:
    """Incremental decoding through ``tokenizers``' own DecodeStream."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._sent = ""

    def push(self, ids: Sequence[int]) -> str:
        text = ""
        for token in ids:
            self._ids.append(token)
            text += self._stream.step(self._tokenizer, token) or ""
        self._sent += text
        return text

    def finish(self) -> str:
        whole: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return whole[len(self._sent) :]


class FileTokenizer:
    """The tokenizer of a model directory: ``tokenizer.json``, ``tokenizer_config.json``, chat template."""

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"model: {directory} has no tokenizer.json")
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower one
            raise TokenizerError(f"model: {path} is no usable tokenizer: {error}") from None
        settings = _read_json(directory / "tokenizer_config.json")
        self._special = {
            name: _special_text(settings[name])
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if settings.get(name)
        }
        template_file = directory / "chat_template.jinja"
        template = template_file.read_text() if template_file.is_file() else settings.get("chat_template")
        self._template: str | None = template if isinstance(template, str) else None
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.eos_ids: tuple[int, ...] = self._find_eos(directory)

    def _find_eos(self, directory: Path) -> tuple[int, ...]:
        found = _read_json(directory / "generation_config.json").get("eos_token_id")
        if found is None:
            found = _read_json(directory / "config.json").get("eos_token_id")
        if found is None:
            found = self._tokenizer.token_to_id(self._special.get("eos_token", ""))
        if found is None:
            return ()
        return tuple(found) if isinstance(found, list) else (int(found),)

    def encode(self, text: str) -> list[int]:
        """Ids, with the special ids that the tokenizer's post-processor adds (Llama: bos)."""
        _utf8(text)
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without specials."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def stream_decoder(self) -> StreamDecoder:
        """A fresh incremental decoder."""
        return _FileStream(self._tokenizer)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The model's own Jinja template, rendered in a sandbox."""
        if not messages:
            raise TokenizerError("messages: at least one is required")
        if self._template is None:
            raise TokenizerError("messages: this model has no chat template; use /v1/completions")

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        turns = [{**m, "content": message_text(i, m)} for i, m in enumerate(messages)]
        try:
            text = environment.from_string(self._template).render(
                messages=turns, add_generation_prompt=True, **self._special
            )
        except TemplateError as error:
            raise TokenizerError(f"messages: the chat template refuses them: {error}") from None
        _utf8(text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise TokenizerError(f"model: {path} is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _special_text(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a built-in model or of a local model directory.

    Raises:
        TokenizerError: when there is none.
    """
    if model.startswith(BUILTIN_PREFIX):
        return ByteTokenizer()
    directory = Path(model)
    if not directory.is_dir():
        raise TokenizerError(
            f"model: must be builtin/tiny-llama, builtin/tiny-qwen3 or a directory, got {model!r}"
        )
    return FileTokenizer(directory)
