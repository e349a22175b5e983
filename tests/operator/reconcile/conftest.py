from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

RARELY = 20_000
"""New objects until the collector looks for cycles; Python's default is 700."""


@pytest.fixture(autouse=True, scope="package")
def rare_collections() -> Iterator[None]:
    """What is kept to start from is many objects, and to look through them takes a tenth of a run."""
    usual = gc.get_threshold()
    gc.set_threshold(RARELY, *usual[1:])
    yield
    gc.set_threshold(*usual)
