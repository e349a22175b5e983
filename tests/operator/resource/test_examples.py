"""Every example is one that the product accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpilot_operator.resource import KVCacheDeployment, KVCacheOverride, load_document
from kvpilot_operator.resource.override import KINDS
from kvpilot_operator.resource.resolve import not_yet_effective, policy_of
from kvpilot_operator.resource.times import duration_s

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))


def test_there_are_the_examples_that_the_documentation_names() -> None:
    names = {path.stem for path in EXAMPLES}
    assert {"production", "high-performance", "gpu", "replicas"} <= names
    assert {f"override-{kind}" for kind in KINDS} <= names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid_and_has_only_effective_values(path: Path) -> None:
    document = load_document(path)
    if document["kind"] == "KVCacheOverride":
        override = KVCacheOverride.parse(document, str(path)).spec
        assert override.ttl is not None, "an absolute time is wrong on most days that the example is applied"
        assert 0 < duration_s(override.ttl) <= 3600
        return
    spec = KVCacheDeployment.parse(document, str(path)).spec
    policy_of(spec)
    assert not_yet_effective(spec) == []
