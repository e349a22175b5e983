"""Text of an exact number of tokens, the same for the same key.

The built-in models' tokenizer makes one token of one ASCII character, so a text of n printable characters is
n tokens; for other models it is roughly that.
"""

from __future__ import annotations

import hashlib

_WORDS = b"abcdefghijklmnopqrstuvwxyz      ,.ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-"
_TABLE = bytes(_WORDS[i % len(_WORDS)] for i in range(256))


def text_of(key: str, length: int) -> str:
    """``length`` printable ASCII characters; a shorter text of a key is the beginning of a longer one."""
    digest = hashlib.shake_128(key.encode()).digest(length)
    return digest.translate(_TABLE).decode("ascii")
