"""Field types that several models of the resource share."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue
from pydantic.alias_generators import to_camel

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract.metrics import EDGES_S
from kvpilot_operator.resource.quantity import parse_bytes
from kvpilot_operator.tuning.configuration import KNOBS
from kvpilot_operator.tuning.rules.order import REMEDIES

EDGES_MS: tuple[int, ...] = tuple(round(edge * 1000) for edge in EDGES_S)
"""Edges of the latency histograms, ms: the possible latency objectives."""

_FIELDS = frozenset(info.alias for info in KVCacheConfig.model_fields.values())

RULE_NAMES: tuple[str, ...] = tuple(remedy.name for remedy in REMEDIES)
"""Possible values of ``disabledRules``."""

PERCENT_PATTERN = r"^(100(\.0{1,2})?|[0-9]{1,2}(\.[0-9]{1,2})?)%$"
NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
NAME_LIMIT = 63
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
"""A namespace, and a name of any resource here, by the rules of the API server."""


class Part(BaseModel):
    """A part of the resource: immutable, camelCase, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel)


def rules(*pairs: tuple[str, str]) -> ConfigDict:
    """CEL rules (rule, message) of the generated definition; each repeats a validator of the model."""
    validations: list[JsonValue] = [{"rule": rule, "message": message} for rule, message in pairs]
    return ConfigDict(json_schema_extra={"x-kubernetes-validations": validations})


def _bytes(value: str) -> str:
    parse_bytes(value)
    return value


def _edge(value: int) -> int:
    if value not in EDGES_MS:
        allowed = ", ".join(map(str, EDGES_MS))
        raise ValueError(f"must be one of the published edges {allowed} ms")
    return value


def _percent(value: str) -> str:
    if not re.match(PERCENT_PATTERN, value):
        raise ValueError('must be a percentage from "0%" to "100%", written as a string')
    return value


def _knob(value: str) -> str:
    if value in KNOBS:
        return value
    knobs = f"must be one of the knobs {', '.join(KNOBS)}"
    if value in _FIELDS:
        raise ValueError(f"{knobs}; {value} is none, and only spec.engine.config sets it")
    raise ValueError(knobs)


def _rule(value: str) -> str:
    if value not in RULE_NAMES:
        raise ValueError(f"no such rule; allowed: {', '.join(RULE_NAMES)}")
    return value


def _no_yaml_boolean(value: Any) -> Any:
    if value is False:
        raise ValueError(
            'must be "Off", "Recommend", "Approve" or "Auto"; YAML reads a bare Off as false, so quote it'
        )
    return value


EdgeMs = Annotated[int, AfterValidator(_edge), Field(json_schema_extra={"enum": list(EDGES_MS)})]
Percent = Annotated[str, AfterValidator(_percent), Field(json_schema_extra={"pattern": PERCENT_PATTERN})]
KnobName = Annotated[str, AfterValidator(_knob), Field(json_schema_extra={"enum": list(KNOBS)})]
RuleName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$"), AfterValidator(_rule)]
Bytes = Annotated[str, AfterValidator(_bytes), Field(max_length=32)]
Quoted = BeforeValidator(_no_yaml_boolean)


def ratio_of(percent: str) -> float:
    """``"70%"`` -> 0.7."""
    return round(float(percent.removesuffix("%")) / 100, 6)
