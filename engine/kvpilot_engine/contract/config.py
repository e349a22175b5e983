"""KVCacheConfig: every setting of the engine, in one validated, immutable value.

Python spells the fields in snake_case, the resource and the admin API in camelCase; both are this model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

PAGE_TOKENS = 16
"""Tokens in a page: the unit of hashing and of the device pool."""

BLOCK_TOKENS = 128
"""Tokens in a block (8 pages, all layers): the unit of the tiers below the device pool."""


class CacheStrategy(StrEnum):
    """Which page is evicted from the device pool first."""

    LRU = "lru"
    LFU = "lfu"
    FIFO = "fifo"
    ADAPTIVE = "adaptive"

    @property
    def runs_as(self) -> CacheStrategy:
        """The strategy whose policy runs: ``adaptive`` has none of its own yet."""
        return CacheStrategy.LRU if self is CacheStrategy.ADAPTIVE else self


class ConfigWarning(UserWarning):
    """A setting that is accepted but doubtful, or that has no effect in this version."""


@dataclass(frozen=True)
class Notice:
    """A remark on a field (snake_case) of an accepted configuration."""

    field: str
    message: str


def warn_of(notices: Sequence[Notice], stacklevel: int) -> None:
    """Warn once with all notices, if there are any. ``stacklevel``: as in ``warnings.warn``, from here."""
    if notices:
        text = "; ".join(f"{notice.field}: {notice.message}" for notice in notices)
        warnings.warn(text, ConfigWarning, stacklevel=stacklevel)


def _enum_by_value(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _dtype_name(value: Any) -> Any:
    """Accept ``torch.float16`` as well as ``"float16"`` without importing torch."""
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _number(value: Any) -> Any:
    """Refuse booleans and strings, which pydantic would convert to numbers."""
    if isinstance(value, (bool, str, bytes)):
        raise PydanticCustomError("number_type", "Input should be a number")
    return value


Int = Annotated[int, BeforeValidator(_number)]
MaybeInt = Annotated[int | None, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
Flag = Annotated[bool, Strict()]
Strategy = Annotated[CacheStrategy, BeforeValidator(_enum_by_value)]
DType = Annotated[Literal["float16", "bfloat16", "float32"], BeforeValidator(_dtype_name)]


class KVCacheConfig(BaseModel):
    """Settings of a KV-cache engine. Immutable; derive another with :meth:`updated`.

    Raises:
        pydantic.ValidationError: for an unknown field or a value out of bounds; each error names both.

    Warns:
        ConfigWarning: once per construction, listing every doubtful value and every field without effect yet.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True, validate_default=True
    )

    # Shape of the model. An explicit value that differs from the model is an error at load.
    num_heads: MaybeInt = Field(None, ge=1, description="Attention heads; taken from the model.")
    head_dim: MaybeInt = Field(None, ge=1, description="Width of a head; taken from the model.")

    # The cache.
    max_tokens: Int = Field(4096, ge=128, le=16_777_216, description="Quota of the device pool, tokens.")
    block_size: Literal[128] = Field(128, description="Tokens in a block of the tiers below the device pool.")
    cache_strategy: Strategy = Field(
        CacheStrategy.ADAPTIVE, description="Eviction policy of the device pool."
    )
    max_memory_mb: MaybeInt = Field(
        None, ge=100, le=16_777_216, description="Budget of all cache memory, MiB; no budget without a value."
    )
    host_memory_mb: Int = Field(
        256, ge=0, le=1_048_576, description="Budget of the host tier, MiB; 0 turns it off."
    )
    use_compression: Flag = Field(True, description="Encode blocks that leave the device pool.")
    compression_ratio: Float = Field(
        0.3,
        gt=0.0,
        le=1.0,
        multiple_of=0.01,
        description="Fraction of 16-bit bytes to keep; it selects the compression level.",
    )
    use_quantization: Flag = Field(False, description="Quantise the device pool; this can change answers.")
    quantization_bits: Literal[4, 8, 16] = Field(8, description="Bits of a quantised device pool.")
    enable_gc: Flag = Field(True, description="Evict cached pages before their memory is needed.")
    gc_threshold: Float = Field(
        0.8, gt=0.0, le=1.0, description="Memory ratio from which pages are evicted early."
    )
    enable_prefetch: Flag = Field(True, description="Fetch blocks ahead from slower tiers.")
    prefetch_size: Int = Field(4, ge=0, le=1024, description="Blocks fetched ahead per request.")
    enable_persistence: Flag = Field(False, description="Keep blocks on disk across restarts.")
    persistence_path: str | None = Field(None, description="Directory of the disk tier.")
    enable_warmup: Flag = Field(False, description="Load the most used prefixes at start.")
    warmup_samples: Int = Field(100, ge=0, description="Prefixes loaded at start.")
    multi_tenant: Flag = Field(False, description="Serve several tenants from one pool.")
    tenant_isolation: Flag = Field(True, description="Never share cached pages between tenants.")

    # Concurrency.
    num_workers: Int = Field(
        4, ge=1, le=128, description="Worker slots: requests that hold pages or load from a tier at once."
    )
    batch_size: Int = Field(1, ge=1, le=256, description="Sequences in one step.")
    max_step_tokens: Int = Field(512, ge=16, le=16384, description="Prefill and decode tokens in one step.")
    max_queue: Int = Field(
        256, ge=1, le=100_000, description="Requests that may wait; HTTP sheds further ones with 429."
    )
    request_timeout_s: Float = Field(
        60.0, gt=0, le=3600, description="Longest time of a request in the engine, s."
    )

    # Cold: a change needs a restart.
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs.")
    dtype: DType = Field("float16", description="Type of weights, activations and raw pages.")
    deterministic: Flag = Field(
        False, description="Bit-equal logits for hit or miss (CPU, float32, about half as fast)."
    )
    pin_memory: Flag = Field(True, description="Page-lock host buffers (CUDA only).")
    non_blocking: Flag = Field(True, description="Overlap copies with compute (CUDA only).")

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        twice = [name for name in cls.model_fields if name in data and to_camel(name) in data and "_" in name]
        if twice:
            raise ValueError(f"{to_camel(twice[0])} is given twice, also as {twice[0]}")
        return data

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.deterministic and (self.dtype != "float32" or self.device == "cuda"):
            raise ValueError(
                f"deterministic needs dtype float32 on the CPU, got dtype={self.dtype}, device={self.device}"
            )
        return self

    def model_post_init(self, context: Any, /) -> None:
        """Warn once of the explicitly given values that are doubtful or have no effect."""
        if context is QUIET:
            return
        warn_of(self.notices(), stacklevel=5)

    def notices(self) -> list[Notice]:
        """Remarks on explicitly given values that are doubtful or have no effect."""
        return [*self._doubtful(), *self.not_yet_effective()]

    def _doubtful(self) -> list[Notice]:
        given = self.model_fields_set
        checks = (
            (
                "max_tokens",
                self.max_tokens < 512,
                f"{self.max_tokens} holds few prompts; 512 or more is usual",
            ),
            (
                "max_tokens",
                self.max_tokens > 65536,
                f"{self.max_tokens} is very large; 65536 or less is usual",
            ),
            (
                "compression_ratio",
                not 0.1 <= self.compression_ratio <= 0.9,
                f"{self.compression_ratio} is outside the useful range 0.1 to 0.9",
            ),
            (
                "prefetch_size",
                self.prefetch_size > 64,
                f"{self.prefetch_size} blocks ahead; 64 or less is usual",
            ),
        )
        return [Notice(field, text) for field, doubtful, text in checks if doubtful and field in given]

    def not_yet_effective(self) -> list[Notice]:
        """Explicitly given values that this version accepts and ignores."""
        given, strategy = self.model_fields_set, self.cache_strategy
        inert = (
            ("cache_strategy", strategy.runs_as is not strategy, f"{strategy} runs as {strategy.runs_as}"),
            ("use_quantization", self.use_quantization, "the device pool stays in dtype"),
            ("quantization_bits", self.quantization_bits != 8, "the device pool stays in dtype"),
            ("enable_gc", not self.enable_gc, "pages are evicted on demand only"),
            ("gc_threshold", self.gc_threshold != 0.8, "pages are evicted on demand only"),
            ("pin_memory", self.pin_memory, "host buffers are ordinary memory"),
            ("non_blocking", self.non_blocking, "copies are ordered with the steps"),
            ("enable_persistence", self.enable_persistence, "there is no disk tier yet"),
            ("persistence_path", self.persistence_path is not None, "there is no disk tier yet"),
            ("enable_warmup", self.enable_warmup, "the cache starts cold"),
            ("warmup_samples", self.warmup_samples != 100, "the cache starts cold"),
            ("multi_tenant", self.multi_tenant, "all requests share one tenant"),
            ("tenant_isolation", not self.tenant_isolation, "all requests share one tenant"),
        )
        return [
            Notice(field, f"has no effect yet: {text}")
            for field, idle, text in inert
            if idle and field in given
        ]

    def updated(self, values: dict[str, Any]) -> KVCacheConfig:
        """This configuration with ``values`` (either spelling) replaced, validated as a whole.

        Raises:
            pydantic.ValidationError: naming the field and the value.
        """
        given = {
            name: getattr(self, name)
            for name in self.model_fields_set
            if name not in values and to_camel(name) not in values
        }
        return type(self).model_validate({**given, **values}, context=QUIET)

    def difference(self, other: KVCacheConfig) -> dict[str, Any]:
        """Fields (snake_case) of ``other`` that differ from this configuration."""
        mine, theirs = self.model_dump(), other.model_dump()
        return {name: theirs[name] for name in theirs if theirs[name] != mine[name]}


QUIET = object()
"""Validation context that suppresses the warning, for values that a user has been warned of before."""

COLD_FIELDS = frozenset(
    {
        "num_heads", "head_dim", "block_size", "device", "dtype", "deterministic",
        "pin_memory", "non_blocking", "use_quantization", "quantization_bits",
        "multi_tenant", "tenant_isolation", "enable_persistence", "persistence_path",
        "enable_warmup", "warmup_samples",
    }
)  # fmt: skip
"""Fields that take effect only at the next start of the engine."""

LENGTH_FIELDS = frozenset({"max_tokens", "max_memory_mb", "dtype"})
"""Fields that bound how many tokens a request may have: the device pool must hold it whole."""


def config_errors(error: ValidationError) -> list[str]:
    """One line for each error of a configuration or resource: field, value, and what is allowed."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "config"
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown field")
        elif item["type"] == "missing":
            lines.append(f"{where}: required")
        elif item["loc"]:
            lines.append(f"{where}: {item['msg']}, got {item['input']!r}")
        else:
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
    return lines
