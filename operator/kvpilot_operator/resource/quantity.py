"""Kubernetes quantities, such as ``2Gi``, ``1e9`` or ``128974848000m``.

Grammar, rounding and limit are those of the API server: k8s.io/apimachinery/pkg/api/resource.Quantity.
"""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal

_GRAMMAR = re.compile(
    r"(?P<number>[+-]?(\d+(\.\d*)?|\.\d+))((?P<binary>[KMGTPE]i)|[eE](?P<exponent>[+-]?\d{1,9})|(?P<decimal>[numkMGTPE]?))",
    re.ASCII,
)
_DECIMAL_EXPONENTS = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_MAX_QUANTITY = Decimal(2**63 - 1)


def parse_quantity(text: str) -> Decimal:
    """Value of a quantity in its base unit (bytes, cores); capped at 2^63-1.

    Raises:
        ValueError: ``text`` does not match the grammar.
    """
    match = _GRAMMAR.fullmatch(text)
    if match is None:
        raise ValueError("must be a Kubernetes quantity such as 2Gi, 1.5G or 1e9")
    number = Decimal(match["number"])
    if match["binary"]:
        value = number * Decimal(1024) ** (1 + "KMGTPE".index(match["binary"][0]))
    else:
        exponent = int(match["exponent"] or _DECIMAL_EXPONENTS[match["decimal"] or ""])
        value = number.scaleb(max(-99, min(exponent, 99)))  # beyond these the cap and zero decide
    return min(value, _MAX_QUANTITY)


def parse_bytes(text: str) -> int:
    """Whole bytes of a quantity, rounded up.

    Raises:
        ValueError: ``text`` is no quantity, or less than one byte.
    """
    value = parse_quantity(text)
    if value < 1:
        raise ValueError("must be at least one byte; m means thousandths, Mi means mebibytes")
    return int(value.to_integral_value(ROUND_CEILING))
