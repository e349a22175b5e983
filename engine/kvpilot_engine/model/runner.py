"""Runs one step of the model: packs new tokens, attends over the pool, returns logits."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvpilot_engine.contract import PAGE_TOKENS
from kvpilot_engine.model.attention import Chunk, DecodeGroup, PagedContext, Tile
from kvpilot_engine.model.loading import LoadedModel

_SPLIT_TOKENS = 1024
"""Padding of a decode group, tokens over all rows, above which a further group costs less."""

_MEASURED_ROWS = (1, 2, 4, 8, 16, 32)
_MEASURED_TOKENS = 256
_MEASURED_RUNS = 3


@dataclass(frozen=True)
class Work:
    """New tokens of one sequence in a step.

    Attributes:
        tokens: the new ids, at least one.
        start: position of the first one.
        pages: pages of the sequence, up to the last new position at least.
        sample: return the logits after the last new token.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    sample: bool


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_BYTES = 64 << 20
_MMAP_BYTES = 32 << 20  # the maximum of glibc


def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MiB of freed activations instead of returning them after each use.

    By default each buffer of some MiB is mapped anew and its pages fault one by one: a decode step with 32
    rows of 512 tokens takes 23 ms instead of 11 (measured on a 2-core CPU). Has no effect without glibc.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


class ModelRunner:
    """A model on paged attention. It keeps no state between steps: each call gets the pool."""

    def __init__(self, model: LoadedModel, deterministic: bool = False) -> None:
        """Args:
        model: the model.
        deterministic: attend in fixed tiles; ``determinism.make_deterministic`` converts the linears.
        """
        self.model = model
        self._deterministic = deterministic
        self._device = model.device
        if model.device.type == "cpu":
            keep_freed_memory()
        self._banned: torch.Tensor | None = None
        if model.allowed_ids is not None:
            banned = torch.ones(model.module.config.vocab_size, dtype=torch.bool)
            banned[list(model.allowed_ids)] = False
            self._banned = banned.to(self._device)
        if deterministic:
            span = PAGE_TOKENS
            causal = torch.full((span, span), float("-inf")).triu(1)
            columns = model.context_length + span
            self._tile_mask = torch.cat([torch.zeros(span, columns - span), causal], dim=1)

    @torch.inference_mode()
    def run(self, works: Sequence[Work], k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Run one step.

        Args:
            works: one per sequence, in any order.
            k, v: the pool, [layers, slots, kv_heads, head_dim]; the new keys and values are written.

        Returns:
            float32 logits of the works with ``sample``, in order, [n, vocabulary]; banned ids are -inf.
        """
        ids: list[int] = []
        for work in works:
            ids.extend(work.tokens)
        positions = np.concatenate([np.arange(w.start, w.start + len(w.tokens)) for w in works])
        ends = np.cumsum([len(w.tokens) for w in works])
        keep = [int(end) - 1 for end, work in zip(ends, works, strict=True) if work.sample]
        ctx = self._context(works, ends, k, v)
        output: Any = self.model.module(
            input_ids=self._tensor(ids).unsqueeze(0),
            position_ids=self._tensor(positions).unsqueeze(0),
            use_cache=False,
            logits_to_keep=self._tensor(keep),
            ctx=ctx,
        )
        logits: torch.Tensor = output.logits[0].float()
        if self._banned is not None:
            logits = logits.masked_fill(self._banned, float("-inf"))
        return logits

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(self._device, non_blocking=True)

    def _context(self, works: Sequence[Work], ends: Any, k: torch.Tensor, v: torch.Tensor) -> PagedContext:
        slots = self._tensor(np.concatenate([_slots(work) for work in works]))
        ctx = PagedContext(k, v, slots)
        if self._deterministic:
            for work, end in zip(works, ends, strict=True):
                ctx.tiles.extend(self._tiles(work, int(end) - len(work.tokens)))
            return ctx
        single = [
            (int(end) - 1, work) for work, end in zip(works, ends, strict=True) if len(work.tokens) == 1
        ]
        ctx.groups.extend(self._group(part) for part in _by_length(single))
        for work, end in zip(works, ends, strict=True):
            if len(work.tokens) > 1:
                ctx.chunks.append(self._chunk(work, int(end)))
        return ctx

    def _group(self, rows: list[tuple[int, Work]]) -> DecodeGroup:
        lengths = np.array([work.start + 1 for _, work in rows])
        width = -(-int(lengths.max()) // PAGE_TOKENS)
        pages = np.zeros((len(rows), width), dtype=np.int64)
        for i, (_, work) in enumerate(rows):
            own = work.pages[:width]
            pages[i, : len(own)] = own
        beyond = np.arange(width * PAGE_TOKENS) >= lengths[:, None]
        mask = torch.zeros(len(rows), 1, 1, width * PAGE_TOKENS, dtype=self.model.dtype, device=self._device)
        mask.view(len(rows), -1).masked_fill_(torch.from_numpy(beyond).to(self._device), float("-inf"))
        return DecodeGroup(self._tensor([row for row, _ in rows]), self._tensor(pages).view(-1), mask)

    def _chunk(self, work: Work, end: int) -> Chunk:
        count = len(work.tokens)
        length = work.start + count
        pages = self._tensor(work.pages[: -(-length // PAGE_TOKENS)])
        if work.start == 0:
            return Chunk(end - count, end, pages, length, None)
        mask = torch.full((count, length), float("-inf"), dtype=self.model.dtype, device=self._device)
        return Chunk(end - count, end, pages, length, mask.triu_(work.start + 1))

    def _tiles(self, work: Work, begin: int) -> list[Tile]:
        tiles = []
        position, stop = work.start, work.start + len(work.tokens)
        while position < stop:
            page = position // PAGE_TOKENS
            end = min(stop, (page + 1) * PAGE_TOKENS)
            mask = self._tile_mask[:, self._tile_mask.shape[1] - (page + 1) * PAGE_TOKENS :]
            pages = self._tensor(work.pages[: page + 1])
            first = begin + position - work.start
            tiles.append(Tile(first, first + end - position, position % PAGE_TOKENS, pages, mask))
            position = end
        return tiles


def _slots(work: Work) -> Any:
    """Slot of each new token: 16 times its page, plus its offset in the page."""
    if len(work.tokens) == 1:
        page, place = divmod(work.start, PAGE_TOKENS)
        return np.array([work.pages[page] * PAGE_TOKENS + place])
    positions = np.arange(work.start, work.start + len(work.tokens))
    return np.asarray(work.pages)[positions // PAGE_TOKENS] * PAGE_TOKENS + positions % PAGE_TOKENS


def _by_length(rows: list[tuple[int, Work]]) -> list[list[tuple[int, Work]]]:
    """Groups of rows of similar length; a new group starts where it saves more padding than a call costs."""
    ordered = sorted(rows, key=lambda row: row[1].start, reverse=True)
    groups: list[list[tuple[int, Work]]] = []
    for place, row in enumerate(ordered):
        longest = groups[-1][0][1].start if groups else 0
        saved = (longest - row[1].start) * (len(ordered) - place)
        if not groups or (row[1].start * 2 < longest and saved > _SPLIT_TOKENS):
            groups.append([])
        groups[-1].append(row)
    return groups


def measure_decode(runner: ModelRunner, budget_s: float = 0.4) -> dict[int, float]:
    """Measure a decode step of 1, 2, 4 ... 32 rows with 256 tokens each, s by rows, on a pool of its own.

    Takes the minimum of a few runs, because other load only makes a step longer. On a CPU with one torch
    thread it measures the time of that thread, because many engines may start on the machine at once.
    """
    alone = runner.model.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    model = runner.model
    pages, most = _MEASURED_TOKENS // PAGE_TOKENS, _MEASURED_ROWS[-1]
    shape = (model.layers, most * _MEASURED_TOKENS, model.kv_heads, model.head_dim)
    k = torch.zeros(shape, dtype=model.dtype, device=model.device)
    v = torch.zeros(shape, dtype=model.dtype, device=model.device)
    works = [
        Work([1], _MEASURED_TOKENS - 1, range(row * pages, (row + 1) * pages), sample=True)
        for row in range(most)
    ]
    curve = {}
    for rows in _MEASURED_ROWS:
        runner.run(works[:rows], k, v).tolist()  # the first run pays for allocations
        times: list[float] = []
        while len(times) < _MEASURED_RUNS and sum(times) < budget_s / len(_MEASURED_ROWS):
            began = clock()
            runner.run(works[:rows], k, v).argmax(dim=-1).tolist()
            times.append(clock() - began)
        curve[rows] = min(times)
    return curve
