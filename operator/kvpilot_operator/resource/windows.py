"""Recurring windows of the resource: maintenance windows and schedules of the number of replicas."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from kvpilot_operator.resource.fields import Part, rules
from kvpilot_operator.resource.times import DURATION_PATTERN, duration_s
from kvpilot_operator.tuning.permission.windows import check_schedule, check_zone
from kvpilot_operator.tuning.policy import Window

LONGEST_S = 7 * 86_400
"""A window is at most a week long, s."""


def _schedule(value: str) -> str:
    check_schedule(value)
    return value


def _zone(value: str) -> str:
    check_zone(value)
    return value


def _duration(value: str) -> str:
    if not 60 <= duration_s(value) <= LONGEST_S:
        raise ValueError("must be one minute to seven days, such as 90m or 8h")
    return value


class RecurringWindow(Part):
    """A time that recurs: it begins by a cron schedule and lasts for a duration."""

    schedule: Annotated[str, AfterValidator(_schedule)] = Field(
        max_length=128,
        description='When it begins: a cron schedule of 5 fields in the time zone, e.g. "0 22 * * 1-5".',
    )
    duration: Annotated[str, AfterValidator(_duration)] = Field(
        pattern=DURATION_PATTERN, description="How long it lasts, such as 90m or 8h; at most seven days."
    )
    time_zone: Annotated[str, AfterValidator(_zone)] = Field(
        "UTC", max_length=64, description="Time zone of the schedule, e.g. Europe/Berlin."
    )

    @property
    def window(self) -> Window:
        """The window as the tuner knows it."""
        return Window(self.schedule, duration_s(self.duration), self.time_zone)


class ScalingSchedule(RecurringWindow):
    """Other bounds of the number of replicas while the window is open."""

    model_config = rules(("!has(self.max) || self.min <= self.max", "min <= max is required"))

    minimum: int = Field(
        alias="min", ge=1, le=1000, description="Least number of replicas while it is open; it only raises."
    )
    maximum: int | None = Field(
        None,
        alias="max",
        ge=1,
        le=1000,
        description="Largest number meanwhile, instead of scaling.max.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"min <= max is required, got min={self.minimum}, max={self.maximum}")
        return self
