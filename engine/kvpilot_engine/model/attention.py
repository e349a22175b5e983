"""Attention over the paged pool, for any decoder of transformers through its ``AttentionInterface``.

All sequences of a step are packed into one row of tokens. A step has *decode groups* (one new token per
sequence, batched over gathered pages that are padded to the longest of the group) and *chunks* (several new
tokens of one sequence), or, in deterministic mode, *tiles* (see ``determinism``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface

from kvpilot_engine.contract import PAGE_TOKENS

IMPLEMENTATION: Final = "kvpilot_paged"

_UNDERSTOOD: Final = frozenset({"dropout", "position_ids", "use_cache", "is_causal"})
"""Arguments of transformers that have no effect here (there is no dropout in evaluation mode)."""


class UnsupportedAttentionError(ValueError):
    """The model passes an attention argument that would be ignored; the message names it."""


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences with one new token each, of similar length.

    Attributes:
        rows: positions of their tokens in the packed row, [B].
        pages: their page tables, padded with any valid page, flattened [B * P].
        mask: 0 where a slot holds a token of the sequence, -inf elsewhere, [B, 1, 1, 16 P].
    """

    rows: torch.Tensor
    pages: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Chunk:
    """Several new tokens of one sequence.

    Attributes:
        begin, end: its tokens in the packed row.
        pages: page table up to the last new token, [P].
        length: tokens of the sequence, the new ones included.
        mask: [end - begin, length]; None when the chunk starts its sequence, which is plain causal.
    """

    begin: int
    end: int
    pages: torch.Tensor
    length: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Tile:
    """New tokens within one absolute span of 16 positions of one sequence.

    Attributes:
        begin, end: its tokens in the packed row.
        offset: position of the first token in the span, 0 to 15.
        pages: page table up to and with the span, [P].
        mask: [16, 16 P], causal within the last 16 columns.
    """

    begin: int
    end: int
    offset: int
    pages: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class PagedContext:
    """Input of attention for one step, beside query, key and value.

    Attributes:
        k, v: the pool, [layers, slots, kv_heads, head_dim].
        slots: slot of the pool for each packed token, [T].
    """

    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor
    groups: list[DecodeGroup] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)


def paged_attention(  # noqa: PLR0917  (transformers' signature)
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    ctx: PagedContext,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Store the new keys and values, then attend over each sequence's pages.

    Args:
        module: the attention layer; its ``layer_idx`` names the layer of the pool.
        query: [1, H, T, D] after RoPE.
        key, value: [1, Hkv, T, D].
        attention_mask: must be None; transformers makes no mask without a mask function.
        scaling: of the scores.
        ctx: the step.
        others: refused, unless None or known to have no effect.

    Returns:
        [1, T, H, D], and None for the weights.

    Raises:
        UnsupportedAttentionError: a mask or an unknown argument was passed.
    """
    if attention_mask is not None:
        raise UnsupportedAttentionError(
            "attention_mask: is not supported; paged attention makes its own masks"
        )
    for name, argument in others.items():
        if argument is not None and name not in _UNDERSTOOD:
            raise UnsupportedAttentionError(f"attention argument {name}={argument!r:.40} is not supported")
    layer_k, layer_v = ctx.k[module.layer_idx], ctx.v[module.layer_idx]
    layer_k.index_copy_(0, ctx.slots, key[0].transpose(0, 1))
    layer_v.index_copy_(0, ctx.slots, value[0].transpose(0, 1))
    _, heads, tokens, width = query.shape
    out = query.new_empty(tokens, heads, width)
    for group in ctx.groups:
        out[group.rows] = _decode(query, layer_k, layer_v, group, scaling)
    for chunk in ctx.chunks:
        out[chunk.begin : chunk.end] = _chunk(query, layer_k, layer_v, chunk, scaling)
    for tile in ctx.tiles:
        out[tile.begin : tile.end] = _tile(query, layer_k, layer_v, tile, scaling)
    return out.unsqueeze(0), None


def gather(layer: torch.Tensor, pages: torch.Tensor, batch: int) -> torch.Tensor:
    """Pages of one layer as [B, Hkv, L, D] (a view of one copy in [B, L, Hkv, D] order)."""
    _, kv_heads, width = layer.shape
    taken = layer.view(-1, PAGE_TOKENS * kv_heads * width).index_select(0, pages)
    return taken.view(batch, -1, kv_heads, width).transpose(1, 2)


def _decode(
    query: torch.Tensor, layer_k: torch.Tensor, layer_v: torch.Tensor, group: DecodeGroup, scaling: float
) -> torch.Tensor:
    """[B, H, D]. Query heads that share a key head are query positions, so that no key is repeated."""
    batch = group.rows.shape[0]
    kv_heads, width = layer_k.shape[1:]
    heads = query.shape[1]
    k, v = gather(layer_k, group.pages, batch), gather(layer_v, group.pages, batch)
    q = (
        query[0]
        .index_select(1, group.rows)
        .transpose(0, 1)
        .reshape(batch, kv_heads, heads // kv_heads, width)
    )
    mask = group.mask.expand(batch, 1, heads // kv_heads, -1)
    return sdpa(q, k, v, attn_mask=mask, scale=scaling).reshape(batch, heads, width)


def _chunk(
    query: torch.Tensor, layer_k: torch.Tensor, layer_v: torch.Tensor, chunk: Chunk, scaling: float
) -> torch.Tensor:
    """[n, H, D]."""
    q = query[:, :, chunk.begin : chunk.end]
    k = gather(layer_k, chunk.pages, 1)[:, :, : chunk.length]
    v = gather(layer_v, chunk.pages, 1)[:, :, : chunk.length]
    causal = chunk.mask is None
    out = sdpa(q, k, v, attn_mask=chunk.mask, is_causal=causal, scale=scaling, enable_gqa=True)
    return out[0].transpose(0, 1)


def _tile(
    query: torch.Tensor, layer_k: torch.Tensor, layer_v: torch.Tensor, tile: Tile, scaling: float
) -> torch.Tensor:
    """[n, H, D]. Always 16 queries against whole pages, so that every call has the same shape."""
    size = tile.end - tile.begin
    q = query.new_zeros(1, query.shape[1], PAGE_TOKENS, query.shape[3])
    q[:, :, tile.offset : tile.offset + size] = query[:, :, tile.begin : tile.end]
    k, v = gather(layer_k, tile.pages, 1), gather(layer_v, tile.pages, 1)
    out = sdpa(q, k, v, attn_mask=tile.mask, scale=scaling, enable_gqa=True)
    return out[0, :, tile.offset : tile.offset + size].transpose(0, 1)


AttentionInterface.register(IMPLEMENTATION, paged_attention)
