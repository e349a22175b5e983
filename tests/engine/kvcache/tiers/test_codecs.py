"""Codecs, against an independent quantiser in numpy and against the known error floors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kvpilot_engine.contract.knobs import COMPRESSION_LEVELS, LEVEL_TOLERANCE
from kvpilot_engine.kvcache import Fidelity, KVLayout
from kvpilot_engine.kvcache.tiers.codecs import CorruptBlockError, codec_named, decode

LAYERS, HEADS, DIM = 3, 2, 32
GROUPS = {"int8": (8, 128), "int4": (4, 32)}


def layout(dtype: torch.dtype = torch.float32, heads: int = HEADS, dim: int = DIM) -> KVLayout:
    return KVLayout(LAYERS, heads, dim, dtype, torch.device("cpu"))


def normal_block(of: KVLayout, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(of.block_shape, generator=generator).to(of.dtype)


def reference_group(values: np.ndarray, bits: int) -> np.ndarray:
    """Asymmetric linear quantiser of one group, step by step."""
    low = np.float32(np.float16(values.min()))
    scale = np.float32(np.float16((np.float32(values.max()) - low) / np.float32(2**bits - 1)))
    if scale == 0:
        return np.full_like(values, low)
    codes = np.clip(np.rint((values - low) / scale), 0, 2**bits - 1).astype(np.float32)
    return codes * scale + low


def reference(block: np.ndarray, bits: int, group: int) -> np.ndarray:
    """K group by group along the tokens of a channel, V along the channels of its tokens."""
    out = np.empty_like(block)
    for layer in range(block.shape[1]):
        for start in range(0, 128, group):
            for channel in range(block.shape[3]):
                at = (0, layer, slice(start, start + group), channel)
                out[at] = reference_group(block[at], bits)
        flat = block[1, layer].reshape(-1, group)
        out[1, layer] = np.stack([reference_group(row, bits) for row in flat]).reshape(128, -1)
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_raw_gives_back_the_bytes(dtype):
    of = layout(dtype)
    block = normal_block(of)
    block.view(-1)[:3] = torch.tensor([float("inf"), float("-inf"), 1e30 if dtype != torch.float16 else 6e4])
    encoded = codec_named("raw").encode(block)
    assert encoded.nbytes == of.block_bytes
    assert torch.equal(decode(encoded, of), block)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(("heads", "dim"), [(HEADS, DIM), (1, 8), (3, 80)])
def test_a_quantiser_equals_the_reference(name, heads, dim):
    of = layout(heads=heads, dim=dim)
    block = normal_block(of)
    block[0, 1, :, 5] *= 20
    block[0, 0, :, 0] = 3.0  # a constant channel
    decoded = decode(codec_named(name).encode(block), of)
    expected = reference(block.numpy(), *GROUPS[name])
    np.testing.assert_allclose(decoded.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("level", COMPRESSION_LEVELS, ids=lambda level: level.codec)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [1, 8])
def test_compression_level_keeps_its_fraction_scales_included(level, dtype, heads):
    of = layout(dtype, heads=heads, dim=64)
    kept = codec_named(level.codec).encode(normal_block(of)).nbytes / (of.block_bytes / dtype.itemsize * 2)
    if level.codec == "raw":
        assert kept == dtype.itemsize / 2
    else:
        assert level.kept - 0.02 <= kept <= level.kept + LEVEL_TOLERANCE


@pytest.mark.parametrize(("name", "floor"), [("int8", 0.0059), ("int4", 0.078)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_error_on_normal_values_is_at_its_floor(name, floor, dtype):
    of = layout(dtype, heads=8, dim=64)
    block = normal_block(of)
    error = (decode(codec_named(name).encode(block), of).float() - block.float()).pow(2).mean().sqrt()
    assert float(error / block.float().pow(2).mean().sqrt()) == pytest.approx(floor, rel=0.03)


@pytest.mark.parametrize(("name", "most"), [("int8", 0.01), ("int4", 0.12)])
def test_outlier_channels_of_k_do_not_spoil_attention(name, most):
    """1% of the channels of K are 20 times larger, as in trained models."""
    of = KVLayout(1, 1, 128, torch.float32, torch.device("cpu"))
    block = normal_block(of)
    block[0, :, :, 7] *= 20
    decoded = decode(codec_named(name).encode(block), of)
    queries = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    queries[:, 7] /= 20  # keeps the logits those of a trained model

    def attend(kv: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(queries @ kv[0, 0].T / 128**0.5, dim=-1)
        return weights @ kv[1, 0]

    exact = attend(block)
    assert float((attend(decoded) - exact).norm() / exact.norm()) < most


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_block_that_float16_scales_cannot_hold_is_stored_raw(name, value):
    of = layout()
    block = normal_block(of)
    block.view(-1)[17] = value
    encoded = codec_named(name).encode(block)
    assert encoded.fidelity is Fidelity.EXACT
    assert torch.equal(torch.nan_to_num(decode(encoded, of)), torch.nan_to_num(block))


@pytest.mark.parametrize("name", ["raw", "int8", "int4"])
def test_a_flipped_bit_is_noticed(name):
    of = layout()
    encoded = codec_named(name).encode(normal_block(of))
    payload = encoded.payload.clone()
    payload[payload.numel() // 2] ^= 1
    with pytest.raises(CorruptBlockError, match="checksum mismatch in a block of"):
        decode(dataclasses.replace(encoded, payload=payload), of)
