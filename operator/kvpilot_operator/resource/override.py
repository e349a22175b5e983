"""KVCacheOverride: what a person or an alert asks of one KVCacheDeployment, until it expires."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kvpilot_engine.contract import KVCacheConfig, knob
from kvpilot_engine.contract.config import QUIET, CacheStrategy
from kvpilot_operator.resource.fields import NAME_LIMIT, NAME_PATTERN, KnobName, Part, rules
from kvpilot_operator.resource.model import Resource
from kvpilot_operator.resource.times import DURATION_PATTERN

KINDS = ("pause", "approve", "pin", "boost", "rollback")
"""What an override may ask for, by its field of the spec."""

DECISION_PATTERN = r"^d-[0-9]{4,9}$"


def allowed_values(name: str) -> str:
    """What an engine accepts as the value of a knob, in words: ``a whole number from 1 to 128``."""
    entry = knob(name)
    if entry.kind == "flag":
        return "true or false"
    info = KVCacheConfig.model_fields[entry.name]
    if entry.kind == "choice":
        choices = get_args(info.annotation) or tuple(item.value for item in CacheStrategy)
        return f"one of {', '.join(map(str, choices))}"
    limits = {
        kind: value
        for rule in info.metadata
        for kind in ("ge", "gt", "le", "multiple_of")
        if (value := getattr(rule, kind, None)) is not None
    }
    low = f"above {limits['gt']:g}" if "gt" in limits else f"from {limits['ge']:g}"
    high = f"{limits['le']:g}" if limits["le"] < 1e6 else str(limits["le"])
    steps = f" in steps of {limits['multiple_of']:g}" if "multiple_of" in limits else ""
    what = "a whole number" if entry.kind == "int" else "a number"
    return f"{what} {low} {'to' if 'ge' in limits else 'and at most'} {high}{steps}"


def knob_value(name: str, value: Any) -> Any:
    """The value of a knob as the configuration writes it.

    Raises:
        ValueError: an engine does not accept it; names what it accepts.
    """
    field = knob(name).name
    try:
        config = KVCacheConfig.model_validate({name: value}, context=QUIET)
    except ValidationError:
        config = None
    if config is None or value is None:
        several = ", got several values" if isinstance(value, (list, dict)) else ""
        raise ValueError(f"{name} must be {allowed_values(name)}{several}")
    return config.model_dump(include={field}, mode="json")[field]


class Pause(Part):
    """No tuning while it is in force. Bounds, boosts and alerts go on, unless ``scaling`` stops them too."""

    scaling: bool = Field(
        False,
        description="Stop everything that sets the number of replicas as well, boosts of alerts included.",
    )


class Approve(Part):
    """Let kvpilot make the change of one pending decision, in mode Approve."""

    decision: str = Field(pattern=DECISION_PATTERN, description="ID of the decision, such as d-0042.")


class Pin(Part):
    """Keep a knob at a value; no rule changes it while it is in force."""

    knob: KnobName = Field(description="The knob.")
    value: Any = Field(
        description="The value, within the bounds of the field in engine.config.",
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )

    @field_validator("value")
    @classmethod
    def _accepted(cls, value: Any, info: ValidationInfo) -> Any:
        return knob_value(info.data["knob"], value) if "knob" in info.data else value


class Boost(Part):
    """At least this many replicas while it is in force, within spec.scaling.max."""

    min_replicas: int = Field(ge=1, le=1000, description="Least number of replicas.")


class Rollback(Part):
    """Go back to the configuration of an earlier generation."""

    to: int = Field(ge=1, le=1_000_000_000, description="Generation to go back to.")


class OverrideSpec(Part):
    """What a person or an alert asks for now."""

    model_config = rules(
        (
            f"[{', '.join(f'has(self.{kind})' for kind in KINDS)}].exists_one(given, given)",
            f"exactly one of {', '.join(KINDS)} is required",
        ),
        ("has(self.ttl) != has(self.expiresAt)", "exactly one of ttl and expiresAt is required"),
    )

    target: str = Field(
        pattern=NAME_PATTERN, max_length=NAME_LIMIT, description="Name of the KVCacheDeployment."
    )
    pause: Pause | None = Field(None, description="No tuning while it is in force.")
    approve: Approve | None = Field(None, description="Make the change of a pending decision.")
    pin: Pin | None = Field(None, description="Keep a knob at a value.")
    boost: Boost | None = Field(None, description="Raise the least number of replicas.")
    rollback: Rollback | None = Field(None, description="Go back to an earlier generation.")
    ttl: str | None = Field(
        None,
        pattern=DURATION_PATTERN,
        description="How long it is in force from its creation, such as 10m or 1h30m.",
    )
    expires_at: AwareDatetime | None = Field(None, description="When it stops being in force.")
    by: str = Field("", max_length=253, description="Who asks.")
    reason: str = Field("", max_length=1024, description="Why.")

    @model_validator(mode="after")
    def _one_request(self) -> Self:
        if sum(getattr(self, kind) is not None for kind in KINDS) != 1:
            raise ValueError(f"exactly one of {', '.join(KINDS)} is required")
        if (self.ttl is None) == (self.expires_at is None):
            raise ValueError("exactly one of ttl and expiresAt is required")
        return self

    @property
    def kind(self) -> str:
        """What it asks for: one of ``KINDS``."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


class OverrideMetadata(BaseModel):
    """Name or generateName of an override."""

    model_config = ConfigDict(
        frozen=True, extra="allow", alias_generator=Part.model_config["alias_generator"]
    )

    name: str = ""
    generate_name: str = ""
    namespace: str = "default"

    @model_validator(mode="after")
    def _named(self) -> Self:
        if not (self.name or self.generate_name):
            raise ValueError("name or generateName is required")
        return self


class KVCacheOverride(Resource):
    """An expiring request to a KVCacheDeployment. The RBAC on this kind is the authorisation."""

    api_version: Literal["kvpilot.io/v1alpha1"]
    kind: Literal["KVCacheOverride"]
    metadata: OverrideMetadata
    spec: OverrideSpec
    status: dict[str, Any] = Field(default_factory=dict)
