"""Sampling against the probabilities it is meant to follow."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from kvpilot_engine.core.sampling import sample
from kvpilot_engine.core.sequence import Sequence
from kvpilot_engine.ipc import messages
from kvpilot_engine.kvcache import PrefixHashes

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]))


def sequence(**options: Any) -> Sequence:
    request = messages.Generate(id="a", prompt=[1], max_new_tokens=1, **options)
    return Sequence.of(request, PrefixHashes(b""), 0, 0.0)


def frequencies(**options: Any) -> dict[int, float]:
    one = sequence(seed=3, **options)
    counts = Counter(sample(LOGITS.expand(1, -1), [one])[0] for _ in range(4000))
    return {token: count / 4000 for token, count in counts.items()}


def test_temperature_one_follows_the_model() -> None:
    found = frequencies(temperature=1.0)
    assert found == pytest.approx({0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}, abs=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    assert frequencies(temperature=1.0, top_p=0.75) == pytest.approx({0: 0.625, 1: 0.375}, abs=0.03)
    assert frequencies(temperature=1.0, top_p=0.4) == {0: 1.0}


def test_temperature_sharpens_and_flattens() -> None:
    assert frequencies(temperature=0.5)[0] == pytest.approx(0.25 / 0.365, abs=0.03)
    assert frequencies(temperature=1e-6) == {0: 1.0}
    assert frequencies(temperature=100.0)[3] == pytest.approx(0.25, abs=0.03)


def test_rows_of_a_batch_have_their_own_settings() -> None:
    rows = LOGITS.expand(3, -1).clone()
    rows[1] = rows[1].flip(0)
    greedy, other, drawn = sequence(), sequence(), sequence(temperature=1.0, seed=1)
    tokens = sample(rows, [greedy, other, drawn])
    assert tokens[:2] == [0, 4]
    assert tokens[2] in range(4)


def test_every_seed_draws_its_own_numbers() -> None:
    """``random.Random`` takes -7 for 7."""
    drawn = {seed: sequence(seed=seed).random.random() for seed in (7, -7, 0, 2**63 - 1, -(2**63))}
    assert len(set(drawn.values())) == 5
    assert drawn[7] == sequence(seed=7).random.random()
