"""Bit-equal logits on a CPU, for any cache hits, any chunking of the prompt and any batch.

Floating-point sums depend on their order, and kernels choose an order by the shape of their input. Therefore
every matrix product has one shape: linear layers run on 16 rows at a time (padded with zeros), attention on
the 16 queries of an absolute span of positions against whole pages up to the end of the span. All other
operations of a decoder compute each row independently.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

import torch
from torch import nn

from kvpilot_engine.contract import PAGE_TOKENS
from kvpilot_engine.model.runner import ModelRunner, Work

TILE_ROWS: Final = 16


class NotDeterministicError(RuntimeError):
    """The self-check found logits that differ; this machine cannot provide ``deterministic``."""


class TiledLinear(nn.Module):
    """A linear layer that multiplies 16 rows at a time."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        flat = rows.reshape(-1, rows.shape[-1])
        count = flat.shape[0]
        if spare := -count % TILE_ROWS:
            flat = torch.cat([flat, flat.new_zeros(spare, flat.shape[1])])
        out = flat.new_empty(flat.shape[0], self.weight.shape[0])
        across = self.weight.t()
        for at in range(0, count, TILE_ROWS):
            torch.mm(flat[at : at + TILE_ROWS], across, out=out[at : at + TILE_ROWS])
        if self.bias is not None:
            out += self.bias
        return out[:count].view(*rows.shape[:-1], self.weight.shape[0])


def make_deterministic(module: nn.Module) -> None:
    """Replace every linear layer of ``module`` by its tiled form, which shares the weights."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, TiledLinear(child))


def self_check(runner: ModelRunner) -> None:
    """Compare the logits of one prompt and three decodes over several ways of computing them.

    Ways: in one chunk; in uneven chunks; behind a cached prefix; in a batch with other sequences.

    Raises:
        NotDeterministicError: names the way that differs.
    """
    length, steps = 5 * PAGE_TOKENS + 7, 3
    generator = torch.Generator().manual_seed(length)
    vocabulary = int(runner.model.module.config.vocab_size)
    tokens: list[int] = torch.randint(vocabulary, (length + steps,), generator=generator).tolist()
    prefix = 3 * PAGE_TOKENS
    whole = _Trial(runner, tokens, length)
    expected = whole.logits([0, length], beside=[])
    trials: dict[str, Any] = {
        "in chunks": _Trial(runner, tokens, length).logits([0, 5, 16, 17, 50, length], beside=[]),
        "behind a hit": _Trial(runner, tokens, length, whole.k, whole.v).logits([prefix, length], beside=[]),
        "in a batch": _Trial(runner, tokens, length).logits([0, 40, length], beside=[1, 37, 90]),
    }
    for way, logits in trials.items():
        if not torch.equal(logits, expected):
            worst = float((logits - expected).nan_to_num().abs().max())
            raise NotDeterministicError(
                f"deterministic: logits differ {way} on this CPU (|dlogit| up to {worst:.1e}); "
                "set deterministic to false"
            )


class _Trial:
    """One way to compute the logits, on its own small pool."""

    def __init__(
        self,
        runner: ModelRunner,
        tokens: list[int],
        prompt: int,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
    ) -> None:
        model = runner.model
        shape = (model.layers, 32 * PAGE_TOKENS, model.kv_heads, model.head_dim)
        self.k = torch.zeros(shape, dtype=model.dtype) if k is None else k.clone()
        self.v = torch.zeros(shape, dtype=model.dtype) if v is None else v.clone()
        self._runner, self._tokens, self._prompt = runner, tokens, prompt

    def logits(self, cuts: list[int], beside: list[int]) -> torch.Tensor:
        """Prefill between the cuts, then decode; [1 + decodes, vocabulary].

        Args:
            cuts: borders of the chunks; the first is the cached length.
            beside: new tokens of each other sequence in every step, on its own pages.
        """
        pages = list(range(8))
        borders = [*pairwise(cuts), *((at, at + 1) for at in range(self._prompt, len(self._tokens)))]
        found = []
        for begin, end in borders:
            own = Work(self._tokens[begin:end], begin, pages, sample=True)
            others = [
                Work(self._tokens[:count], 0, list(range(8 + 7 * i, 15 + 7 * i)), sample=True)
                for i, count in enumerate(beside)
            ]
            rows = self._runner.run([*others[:1], own, *others[1:]], self.k, self.v)
            if end >= self._prompt:
                found.append(rows[min(1, len(others))])
        return torch.stack(found)
