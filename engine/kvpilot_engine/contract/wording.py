"""Words of messages that both halves write."""

from __future__ import annotations


def counted(number: int, noun: str, one: str = "", more: str = "") -> str:
    """A number and its noun, whose plural is regular: ``1 replica``, ``3 replicas``, ``0 rows``.

    Args:
        one, more: a verb that follows, for one and for any other number.
    """
    text, verb = (f"{number} {noun}", one) if number == 1 else (f"{number} {noun}s", more)
    return f"{text} {verb}" if verb else text
