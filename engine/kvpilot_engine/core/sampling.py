"""Sampling of next tokens from logits."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from kvpilot_engine.core.sequence import Sequence


def sample(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    """Sample one token per row.

    Temperature 0 takes the largest logit. Otherwise one number of the request's own generator selects from
    the smallest set of tokens whose probability reaches ``top_p``, so that a seed gives the same answer in
    any batch.

    Args:
        logits: float32, [n, vocabulary]; -inf is never sampled.
        sequences: one per row.
    """
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for row, sequence in enumerate(sequences):
        request = sequence.request
        if request.temperature > 0.0:
            tokens[row] = _draw(logits[row], request.temperature, request.top_p, sequence.random.random())
    return tokens


def _draw(logits: torch.Tensor, temperature: float, top_p: float, number: float) -> int:
    # The largest logit is subtracted first, so that a small temperature does not overflow.
    scaled = (logits.double() - logits.max()) / temperature
    ordered, ids = torch.softmax(scaled, dim=-1).sort(descending=True, stable=True)
    reached = ordered.cumsum(dim=-1)
    kept = int((reached < top_p).sum()) + 1
    reached = reached[:kept]
    place = int(torch.searchsorted(reached, number * reached[-1], right=True))
    return int(ids[min(place, kept - 1)])
