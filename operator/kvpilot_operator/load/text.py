"""Deterministic text of a given length, by key.

The tokenizer of the built-in models makes one token of each ASCII character, so n characters are n tokens;
other models make fewer.
"""

from __future__ import annotations

import hashlib

_WORDS = b"abcdefghijklmnopqrstuvwxyz      ,.ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-"
_TABLE = bytes(_WORDS[i % len(_WORDS)] for i in range(256))


def text_of(key: str, length: int) -> str:
    """``length`` printable ASCII characters; shorter texts of the same key are prefixes of longer ones."""
    digest = hashlib.shake_128(key.encode()).digest(length)
    return digest.translate(_TABLE).decode("ascii")
