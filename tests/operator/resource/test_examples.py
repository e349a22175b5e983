"""Every example is one that the product accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpilot_operator.spec import KVCacheDeployment, KVCacheOverride, load_document
from kvpilot_operator.spec.resolve import not_yet_effective, policy_of

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def test_there_are_the_examples_that_the_documentation_names() -> None:
    names = {path.stem for path in EXAMPLES}
    assert {"production", "high-performance", "gpu", "replicas", "override-pause", "override-boost"} <= names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid_and_has_only_effective_values(path: Path) -> None:
    document = load_document(path)
    if document["kind"] == "KVCacheOverride":
        KVCacheOverride.parse(document, str(path))
        return
    spec = KVCacheDeployment.parse(document, str(path)).spec
    policy_of(spec)
    assert not_yet_effective(spec) == []
