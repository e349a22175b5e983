"""KVCacheConfig: types, names and updates."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
from pydantic import ValidationError

from kvpilot_engine.contract import VERSION, KVCacheConfig, config_errors
from kvpilot_engine.contract.config import QUIET

BASE = KVCacheConfig.model_validate({"numWorkers": 8}, context=QUIET)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"numWorkers": True}, "numWorkers: Input should be a number, got True"),
        ({"numWorkers": "8"}, "numWorkers: Input should be a number, got '8'"),
        ({"maxMemoryMb": "500"}, "maxMemoryMb: Input should be a number, got '500'"),
        ({"compressionRatio": "0.5"}, "compressionRatio: Input should be a number, got '0.5'"),
        ({"useCompression": "false"}, "useCompression: Input should be a valid boolean, got 'false'"),
        ({"useCompression": 1}, "useCompression: Input should be a valid boolean, got 1"),
        ({"numWorkers": 4, "num_workers": 9}, "config: numWorkers is given twice, also as num_workers"),
    ],
)
def test_value_of_wrong_type_and_duplicate_name_are_refused(values: dict[str, Any], line: str) -> None:
    for take in (lambda: KVCacheConfig.model_validate(values, context=QUIET), lambda: BASE.updated(values)):
        with pytest.raises(ValidationError) as raised:
            take()
        assert config_errors(raised.value) == [line]


@pytest.mark.parametrize("config", [None, 5, True, "lru", []])
def test_config_that_is_no_mapping_is_refused_in_one_line(config: Any) -> None:
    with pytest.raises(ValidationError) as raised:
        KVCacheConfig.model_validate(config)
    (line,) = config_errors(raised.value)
    assert line.startswith("config: Input should be")


def test_size_beyond_any_machine_is_refused_before_allocation() -> None:
    with pytest.raises(ValidationError) as raised:
        KVCacheConfig.model_validate({"maxTokens": 10**12}, context=QUIET)
    assert config_errors(raised.value) == [
        "maxTokens: Input should be less than or equal to 16777216, got 1000000000000"
    ]


def test_update_accepts_either_spelling_and_keeps_other_fields() -> None:
    assert BASE.updated({"num_workers": 9}).num_workers == 9
    assert BASE.updated({"numWorkers": 9}).num_workers == 9
    both = BASE.updated({"batchSize": 2})
    assert both.model_dump(exclude_unset=True) == {"num_workers": 8, "batch_size": 2}
    assert BASE.updated({"compressionRatio": 1, "maxTokens": 1024.0}).max_tokens == 1024


def test_version_of_the_contract_is_that_of_the_distribution() -> None:
    assert version("kvpilot") == VERSION
