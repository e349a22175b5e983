"""Frames on the socket between front and core: a 4-byte big-endian length and a msgpack body."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")

_LENGTH = struct.Struct(">I")
_ENCODER = msgspec.msgpack.Encoder()


def frame(message: msgspec.Struct) -> bytes:
    """A message as length and body."""
    body = _ENCODER.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameReader(Generic[T]):
    """Decodes a byte stream into messages of one union type."""

    def __init__(self, kind: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        """Messages completed by ``data``, in order; consume all of them before feeding more.

        Raises:
            msgspec.DecodeError: the peer uses another protocol.
        """
        self._buffer += data
        start, end = 0, len(self._buffer)
        with memoryview(self._buffer) as view:
            while end - start >= _LENGTH.size:
                body = start + _LENGTH.size
                stop = body + _LENGTH.unpack_from(view, start)[0]
                if stop > end:
                    break
                yield self._decoder.decode(view[body:stop])
                start = stop
        del self._buffer[:start]
