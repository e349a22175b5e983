"""Messages between the front process and the core process: msgpack over a local socket, one frame each.

A frame is a 4-byte big-endian length and a msgpack body. Requests of the front carry an ``id`` that the
core's answers repeat. Times are seconds; monotonic clocks of the two processes are never compared.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Generate(msgspec.Struct, tag=True, frozen=True):
    """One sequence to complete.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: upper bound of new tokens, at least 1; None for as many as fit behind the prompt.
        temperature: 0 is greedy.
        priority: higher is more urgent.
        salt: root of the hash chain, from the authenticated tenant.
        exact_only: use cached pages of exact fidelity only.
        timeout_s: the core ends the request with ``timeout`` after this long.
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
    """The client left: free what the request holds. Answered by ``Finished(reason="cancelled")``."""

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
        reason: stop | length | cancelled | timeout | invalid | error.
        message: for the last three, one clear line.
        cached_tokens: prompt tokens served from the cache.
        stages: seconds by ``contract.metrics.Stage`` value; they add up to the time in the core.
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
    """A change has landed; fields as in ``contract.admin.ApplyReport``."""

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
    """A snapshot. Keys are metric names of ``contract.metrics``; a labelled one is ``name{label=value}``.

    Attributes:
        host_bytes: anonymous and shared memory of the core process less free cache slabs.
        device_bytes: device memory outside the cache plus budgeted cache bytes; 0 on a CPU.
    """

    id: str
    counters: dict[str, float]
    gauges: dict[str, float]
    host_bytes: int
    device_bytes: int
    device_limit_bytes: int


class Ready(msgspec.Struct, tag=True, frozen=True):
    """First message of the core: the model is loaded and the self-checks passed."""

    described: Described


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The core cannot start, or met a fault it cannot go on from; it ends after this message."""

    message: str


FromCore = Tokens | Finished | Applied | Refused | Described | Sampled | Ready | Failed
