"""Codecs of stored blocks: raw, 8 bits or 4 bits.

A block is a tensor [2 (K, V), layers, 128 tokens, width]. The quantisers are asymmetric and linear
per group, scale and zero in float16: ``q = round((x - zero) / scale)``, ``x' = q * scale + zero``. K is
grouped along tokens within a channel, since its outliers sit in few channels; V along the channels of a
token (KIVI, arXiv:2402.02750). Groups of 128 at 8 bits and 32 at 4 bits keep 8.25 and 5 bits per element,
scales included: .516 and .313 of 16-bit bytes, as ``contract.knobs.COMPRESSION_LEVELS`` states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import xxhash

from kvpilot_engine.contract import BLOCK_TOKENS
from kvpilot_engine.kvcache.fidelity import Fidelity
from kvpilot_engine.kvcache.pages.pool import KVLayout

_FLOAT16_MAX = 65504.0


class CorruptBlockError(Exception):
    """The payload of a stored block differs from what was written."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A block in the form in which it is stored.

    Attributes:
        fidelity: of the codec; EXACT for raw.
        payload: uint8, one dimension, in host memory.
        checksum: xxh3_64 of the payload.
    """

    fidelity: Fidelity
    payload: torch.Tensor
    checksum: int

    @property
    def nbytes(self) -> int:
        """Size of the payload, bytes."""
        return self.payload.numel()


class Codec(Protocol):
    """Encodes and decodes blocks."""

    fidelity: Fidelity

    def encode(self, block: torch.Tensor) -> Encoded:
        """Encode ``block``; a block with values that the codec cannot represent is encoded raw."""
        ...

    def decode(self, payload: torch.Tensor, layout: KVLayout) -> torch.Tensor:
        """Decode a payload onto the device of ``layout``, in its dtype and ``block_shape``."""
        ...


def _sealed(fidelity: Fidelity, payload: torch.Tensor) -> Encoded:
    payload = payload.cpu()
    return Encoded(fidelity, payload, xxhash.xxh3_64_intdigest(payload.numpy().data))


class RawCodec:
    """Stores the bytes unchanged."""

    fidelity = Fidelity.EXACT

    def encode(self, block: torch.Tensor) -> Encoded:
        """See Codec."""
        payload = torch.empty(block.nbytes, dtype=torch.uint8, device=block.device)
        payload.view(block.dtype).copy_(block.reshape(-1))
        return _sealed(self.fidelity, payload)

    def decode(self, payload: torch.Tensor, layout: KVLayout) -> torch.Tensor:
        """See Codec."""
        return payload.view(layout.dtype).view(layout.block_shape).to(layout.device)


class GroupCodec:
    """Linear quantiser to ``bits`` (8 or 4) in groups of ``group`` elements, a divisor of 128."""

    def __init__(self, bits: int, group: int, fidelity: Fidelity) -> None:
        self.bits = bits
        self.group = group
        self.fidelity = fidelity
        self._top = float(2**bits - 1)

    def encode(self, block: torch.Tensor) -> Encoded:
        """See Codec."""
        if not float(block.abs().amax()) <= _FLOAT16_MAX:  # NaN compares false
            return RAW.encode(block)
        half = block[0].numel()
        codes, scales = self._sizes(half)
        payload = torch.empty(2 * (codes + scales), dtype=torch.uint8, device=block.device)
        for part, (values, axis) in enumerate(self._grouped(block)):
            low = values.amin(axis, keepdim=True).to(torch.float16)
            span = values.amax(axis, keepdim=True) - low.to(torch.float32)
            scale = (span / self._top).to(torch.float16)
            step = scale.to(torch.float32)
            step[step == 0] = torch.inf  # a constant group: every code is 0
            q = values.sub_(low.to(torch.float32)).div_(step).round_().clamp_(0, self._top)
            out = payload[part * (codes + scales) :]
            self._pack(q.to(torch.uint8).reshape(-1), out[:codes])
            both = out[codes : codes + scales].view(torch.float16).view(2, -1)
            both[0].copy_(scale.reshape(-1))
            both[1].copy_(low.reshape(-1))
        return _sealed(self.fidelity, payload)

    def decode(self, payload: torch.Tensor, layout: KVLayout) -> torch.Tensor:
        """See Codec."""
        payload = payload.to(layout.device)
        block = torch.empty(layout.block_shape, dtype=layout.dtype, device=layout.device)
        codes, scales = self._sizes(block[0].numel())
        for part, shape in enumerate(self._shapes(layout.layers, layout.width)):
            stored = payload[part * (codes + scales) :]
            both = stored[codes : codes + scales].view(torch.float16).view(2, -1).to(torch.float32)
            small = (*shape[:2], 1, *shape[3:])
            values = self._unpack(stored[:codes]).view(shape).to(torch.float32)
            values.mul_(both[0].view(small)).add_(both[1].view(small))
            block[part].copy_(values.view(block[part].shape))
        return block

    def _sizes(self, half: int) -> tuple[int, int]:
        """Bytes of the codes, and of scales and zeros, of ``half`` elements."""
        return half * self.bits // 8, half // self.group * 4

    def _shapes(self, layers: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Grouped views of K [layers, groups, group, width] and V [layers, groups, group]."""
        return (layers, BLOCK_TOKENS // self.group, self.group, width), (layers, -1, self.group)

    def _grouped(self, block: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
        """New float32 copies of K and V in their grouped views, each with its group axis."""
        shapes = self._shapes(block.shape[1], block.shape[3])
        return [
            (part.to(torch.float32, copy=True).view(shape), 2)
            for part, shape in zip(block, shapes, strict=True)
        ]

    def _pack(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        if self.bits == 8:
            out.copy_(codes)
            return
        low, high = codes.view(2, -1)
        torch.bitwise_or(low, high << 4, out=out)

    def _unpack(self, stored: torch.Tensor) -> torch.Tensor:
        if self.bits == 8:
            return stored
        return torch.cat((stored & 15, stored >> 4))


RAW = RawCodec()
_CODECS: dict[Fidelity, Codec] = {
    Fidelity.EXACT: RAW,
    Fidelity.INT8: GroupCodec(8, 128, Fidelity.INT8),
    Fidelity.INT4: GroupCodec(4, 32, Fidelity.INT4),
}
_NAMES = {"raw": Fidelity.EXACT, "int8": Fidelity.INT8, "int4": Fidelity.INT4}


def codec_named(name: str) -> Codec:
    """The codec of a level of ``contract.knobs.COMPRESSION_LEVELS``: raw, int8 or int4."""
    return _CODECS[_NAMES[name]]


def decode(encoded: Encoded, layout: KVLayout) -> torch.Tensor:
    """Decode a stored block into ``layout.block_shape``.

    Raises:
        CorruptBlockError: the checksum does not match.
    """
    if xxhash.xxh3_64_intdigest(encoded.payload.numpy().data) != encoded.checksum:
        raise CorruptBlockError(f"checksum mismatch in a block of {encoded.nbytes} bytes")
    return _CODECS[encoded.fidelity].decode(encoded.payload, layout)
