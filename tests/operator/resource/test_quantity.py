"""Quantities mean what the API server reads in them."""

from __future__ import annotations

from decimal import Decimal

import pytest

from kvpilot_operator.resource.quantity import parse_bytes, parse_quantity


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", "0"),
        ("7", "7"),
        ("+7", "7"),
        ("-7", "-7"),
        ("1.5", "1.5"),
        ("5.", "5"),
        (".5", "0.5"),
        ("1n", "0.000000001"),
        ("1u", "0.000001"),
        ("250m", "0.25"),
        ("1k", "1000"),
        ("1M", "1000000"),
        ("1.5G", "1500000000"),
        ("1T", "1e12"),
        ("1P", "1e15"),
        ("1E", "1e18"),
        ("1e9", "1e9"),
        ("1E9", "1e9"),
        ("1e+3", "1000"),
        ("15e-1", "1.5"),
        ("1Ki", str(2**10)),
        ("1Mi", str(2**20)),
        ("2Gi", str(2**31)),
        ("0.5Ti", str(2**39)),
        ("1Pi", str(2**50)),
        ("1Ei", str(2**60)),
        ("100E", str(2**63 - 1)),
        ("8Ei", str(2**63 - 1)),
        ("1e999999999", str(2**63 - 1)),
    ],
)
def test_quantity_of_the_grammar(text: str, value: str) -> None:
    assert parse_quantity(text) == Decimal(value)


@pytest.mark.parametrize(
    "text",
    [
        *("", " 1", "1 ", "1 Gi", "Gi", ".", "+", "--1", "1.2.3"),
        *("1K", "1ki", "1mi", "1gi", "1GB", "1B", "1e", "1e1.5", "1eGi", "1e3Gi", "1e9999999999"),
        *("0x10", "1_000", "\u0661", "NaN", "Infinity"),
    ],
)
def test_text_outside_the_grammar_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must be a Kubernetes quantity such as 2Gi, 1\.5G or 1e9$"):
        parse_quantity(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("64Gi", 64 * 2**30), ("1e9", 10**9), ("128974848000m", 128_974_848), ("1001m", 2), ("1.5", 2)],
)
def test_bytes_are_rounded_up_to_whole_ones(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["0", "500m", "999m", "-1", "-2Gi", "1e-999999999"])
def test_less_than_a_byte_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"^must be at least one byte; m means thousandths, Mi means mebibytes$"
    ):
        parse_bytes(text)
