"""Bodies of the admin API: ``GET /admin/config`` and ``PATCH /admin/config``, in camelCase JSON."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict
from pydantic.alias_generators import to_camel

from kvpilot_engine.contract.config import KVCacheConfig

Serial = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
"""A number that never decreases, below 2**63: every reader of a message can hold it."""


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class ConfigPatch(_Body):
    """A change of hot fields. An ``epoch`` below the engine's own is refused with 409.

    Sending the same generation and values twice is the same as sending them once.
    """

    epoch: Serial = Field(description="Fencing number of the writer; it never decreases.")
    generation: Serial = Field(description="Generation of the resulting configuration.")
    values: dict[str, Any] = Field(description="Fields to replace, camelCase or snake_case.")


class ApplyReport(_Body):
    """Effect of a change, read from the running engine."""

    generation: int
    epoch: int
    changed: list[str] = Field(description="Fields whose value differs from before, camelCase.")
    blocks_kept: int = Field(description="Cached pages still held in all tiers, in blocks.")
    blocks_lost: int = Field(description="Blocks that the change dropped at once.")
    converging: bool = Field(description="True while a lowered quota is not reached yet.")


class AdminConfig(_Body):
    """The live configuration of one engine."""

    contract_version: int
    version: str
    instance: str = Field(description="Random identity of this run of the core process.")
    model: str
    generation: int
    epoch: int
    config: KVCacheConfig
    converging: bool
    ceilings: dict[str, int] = Field(
        description="Largest value each knob can take without a restart, camelCase."
    )
    knobs: list[str] = Field(description="Knobs that can be changed hot, camelCase.")
    not_yet_effective: list[str] = Field(description="Given fields without effect, with the reason.")
