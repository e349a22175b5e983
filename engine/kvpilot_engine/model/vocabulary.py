"""The vocabulary of the built-in models: bytes and a few specials. No torch, as the front reads it too."""

from __future__ import annotations

from typing import Final

BUILTIN_PREFIX: Final = "builtin/"

PAD_ID: Final = 256
BOS_ID: Final = 257
EOS_ID: Final = 258
ROLE_IDS: Final = {"system": 259, "user": 260, "assistant": 261, "tool": 262}
END_OF_TURN_ID: Final = 263
BYTE_VOCAB_SIZE: Final = 264

GENERATED_IDS: Final = (ord("\n"), *range(0x20, 0x7F))
"""Ids that a built-in model generates: newline and printable ASCII; decode and encode are inverses."""
