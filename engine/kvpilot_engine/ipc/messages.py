"""Messages between the front process and the core process: msgpack over a local socket, one frame each.

A frame is a 4-byte big-endian length and a msgpack body. Requests of the front carry an ``id`` that the
core's answers repeat. Times are seconds; monotonic clocks of the two processes are never compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from kvpilot_engine.contract import KVCacheConfig


class CoreStart(msgspec.Struct, frozen=True):
    """Parameters of a core's start.

    Attributes:
        config: explicitly set fields of KVCacheConfig, camelCase.
        generation, epoch: of that configuration.
    """

    model: str = "builtin/tiny-llama"
    revision: str = ""
    config: dict[str, Any] = {}
    generation: int = 0
    epoch: int = 0

    @classmethod
    def of(cls, config: KVCacheConfig, **rest: Any) -> CoreStart:
        """The start of an engine with ``config``."""
        return cls(config=config.model_dump(mode="json", by_alias=True, exclude_unset=True), **rest)


class Generate(msgspec.Struct, tag=True, frozen=True):
    """One sequence to complete.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: upper bound of new tokens, at least 1; None for as many as fit behind the prompt.
        temperature: 0 is greedy.
        priority: higher is more urgent.
        salt: root of the hash chain; separates tenants.
        exact_only: use cached pages of exact fidelity only.
        timeout_s: the core ends the request with ``timeout`` after this time, s.
        stop_ids: token ids that end the sequence (not part of the answer).
    """

    id: str
    prompt: list[int]
    max_new_tokens: int | None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    priority: int = 0
    session_id: str | None = None
    salt: str = ""
    exact_only: bool = False
    timeout_s: float = 60.0
    stop_ids: list[int] = []


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Free what a request holds: its client left. Answered by ``Finished(reason="cancelled")``."""

    id: str


class Apply(msgspec.Struct, tag=True, frozen=True):
    """A configuration change, see ``contract.admin.ConfigPatch``. Answered by ``Applied`` or ``Refused``."""

    id: str
    epoch: int
    generation: int
    values: dict[str, Any]


class Describe(msgspec.Struct, tag=True, frozen=True):
    """Ask for the live configuration. Answered by ``Described``."""

    id: str


class Sample(msgspec.Struct, tag=True, frozen=True):
    """Ask for a snapshot of counters and gauges. Answered by ``Sampled``."""

    id: str


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Finish what is running, then end the core process."""


FromFront = Generate | Abort | Apply | Describe | Sample | Stop


class Tokens(msgspec.Struct, tag=True, frozen=True):
    """New tokens of a sequence, in order, each sent once."""

    id: str
    ids: list[int]


class Finished(msgspec.Struct, tag=True, frozen=True):
    """The end of a request, after its last ``Tokens``.

    Attributes:
        reason: stop | length | cancelled | timeout | invalid | too_large | error.
        message: one line, for timeout, invalid, too_large and error.
        cached_tokens: prompt tokens served from the cache.
        stages: seconds by ``contract.metrics.Stage``; they add up to the time in the core.
        first_token_s: from arrival in the core to the first new token; None without one.
    """

    id: str
    reason: str
    message: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    stages: dict[str, float] = {}
    first_token_s: float | None = None


class Applied(msgspec.Struct, tag=True, frozen=True):
    """A change is in force; fields as in ``contract.admin.ApplyReport``."""

    id: str
    generation: int
    epoch: int
    changed: list[str]
    blocks_kept: int
    blocks_lost: int
    converging: bool


class Refused(msgspec.Struct, tag=True, frozen=True):
    """A change was refused whole. ``code``: stale_epoch | invalid | cold."""

    id: str
    code: str
    message: str


class Described(msgspec.Struct, tag=True, frozen=True):
    """The live configuration; ``config`` is KVCacheConfig in camelCase, explicitly set fields only."""

    id: str
    instance: str
    model: str
    device: str
    context_length: int
    generation: int
    epoch: int
    config: dict[str, Any]
    converging: bool
    ceilings: dict[str, int]


class Sampled(msgspec.Struct, tag=True, frozen=True):
    """A snapshot of the core.

    Attributes:
        counters, gauges: metric name of ``contract.metrics`` -> label value ("" without a label) -> value.
        host_bytes: anonymous and shared memory of the core process less free cache slabs.
        device_bytes: device memory outside the cache plus budgeted cache bytes; 0 on a CPU.
    """

    id: str
    counters: Mapping[str, Mapping[str, float]]
    gauges: Mapping[str, Mapping[str, float]]
    host_bytes: int
    device_bytes: int
    device_limit_bytes: int


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The model is loaded and the self-checks passed: the first message of a core."""

    described: Described


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The core cannot start or continue; it ends after this message."""

    message: str


FromCore = Tokens | Finished | Applied | Refused | Described | Sampled | Ready | Failed
