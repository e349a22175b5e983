"""The resource as a user writes it: KVCacheDeployment.

The definitions in ``crds/`` and the reference pages are generated from these models; local mode validates
with them directly. Fields whose work comes later are absent until they work.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from kvpilot_engine.contract import KVCacheConfig, knob
from kvpilot_engine.contract.config import QUIET
from kvpilot_operator.resource.errors import ManifestError, manifest_errors
from kvpilot_operator.resource.fields import (
    NAME_LIMIT,
    NAME_PATTERN,
    Bytes,
    EdgeMs,
    KnobName,
    Part,
    Percent,
    Quoted,
    RuleName,
    rules,
)
from kvpilot_operator.resource.windows import RecurringWindow, ScalingSchedule

GROUP = "kvpilot.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
DEFAULT_IMAGE = f"ghcr.io/kvpilot/engine:{version('kvpilot')}"


class Latency(Part):
    """Latency limits. p50Ms 100 asks that half of all judged requests finish within 100 ms."""

    model_config = rules(
        ("!has(self.p50Ms) || !has(self.p95Ms) || self.p50Ms <= self.p95Ms", "p50Ms <= p95Ms is required"),
        ("!has(self.p95Ms) || !has(self.p99Ms) || self.p95Ms <= self.p99Ms", "p95Ms <= p99Ms is required"),
        ("!has(self.p50Ms) || !has(self.p99Ms) || self.p50Ms <= self.p99Ms", "p50Ms <= p99Ms is required"),
    )

    signal: Literal["request", "firstToken"] = Field(
        "request", description="What is measured: the whole answer, or the time to its first token."
    )
    p50_ms: EdgeMs | None = Field(None, description="Limit for half of the requests, ms.")
    p95_ms: EdgeMs | None = Field(None, description="Limit for 95% of the requests, ms.")
    p99_ms: EdgeMs | None = Field(None, description="Limit for 99% of the requests, ms.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        given = [edge for edge in (self.p50_ms, self.p95_ms, self.p99_ms) if edge is not None]
        if given != sorted(given):
            raise ValueError(f"p50Ms <= p95Ms <= p99Ms is required, got {given} ms")
        return self


class Throughput(Part):
    """Completed requests/s of the whole deployment, judged only while that many are offered."""

    model_config = rules(("!has(self.floor) || self.floor <= self.target", "floor <= target is required"))

    target: int = Field(ge=0, le=1_000_000, description="Requests/s to reach while offered; 0 judges none.")
    floor: int | None = Field(
        None, ge=0, le=1_000_000, description="Requests/s below which it is severe. Default: half of target."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.floor is not None and self.floor > self.target:
            raise ValueError(f"floor <= target is required, got floor={self.floor}, target={self.target}")
        return self


class Objectives(Part):
    """Limits that override the profile's; what is absent comes from the profile."""

    latency: Latency | None = Field(None, description="Latency limits at published edges.")
    throughput: Throughput | None = Field(None, description="Completed requests/s.")
    hit_rate: Percent | None = Field(
        None, description='Least share of prompt tokens served from the cache, e.g. "70%".'
    )
    memory: Percent | None = Field(None, description='Largest share of the memory limit in use, e.g. "80%".')
    errors: Percent | None = Field(
        None, description='Largest share of requests failed, timed out or shed, e.g. "1%".'
    )


class Model(Part):
    """What the engine serves. Immutable: a new model is a new object."""

    model_config = rules(("self == oldSelf", "model is immutable: a new model is a new KVCacheDeployment"))

    source: str = Field(
        "builtin/tiny-llama",
        min_length=1,
        max_length=512,
        description="builtin/tiny-llama, or a directory: of the image, or below /models with a claim.",
    )
    revision: str = Field("", max_length=128, description="Revision of the source; empty is its default.")
    claim_name: str = Field(
        "", max_length=253, description="PersistentVolumeClaim that holds the model, mounted at /models."
    )


def _camel_case_only(value: Any) -> Any:
    """The engine's Python API takes both spellings; the resource has one."""
    if isinstance(value, dict):
        spelling = {name: info.alias for name, info in KVCacheConfig.model_fields.items()}
        for key in value:
            if spelling.get(key, key) != key:
                raise ValueError(f"unknown field {key}; did you mean {spelling[key]}?")
    return value


EngineConfig = Annotated[KVCacheConfig, BeforeValidator(_camel_case_only)]


class Engine(Part):
    """The engine and its base configuration."""

    image: str = Field(DEFAULT_IMAGE, min_length=1, description="Image of the engine.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description="When to pull it; absent leaves it to Kubernetes."
    )
    model: Model = Field(default_factory=Model, description="What the engine serves; immutable.")
    config: EngineConfig = Field(
        default_factory=KVCacheConfig,
        description="Base values; the tuner overlays them and never edits them.",
    )


class KnobRange(Part):
    """Bounds of the tuner for one knob."""

    model_config = rules(
        ("!has(self.min) || !has(self.max) || self.min <= self.max", "min <= max is required")
    )

    name: KnobName = Field(description="The knob.")
    minimum: float | None = Field(None, alias="min", description="Least value the tuner may choose.")
    maximum: float | None = Field(None, alias="max", description="Largest value the tuner may choose.")
    tune: bool = Field(True, description="False keeps the tuner's hands off it.")
    direction: Literal["Both", "UpOnly", "DownOnly"] = Field(
        "Both", description="Which way the tuner may change it."
    )

    @model_validator(mode="after")
    def _within(self) -> Self:
        bounds = (self.minimum, self.maximum)
        if knob(self.name).kind in {"flag", "choice"} and bounds != (None, None):
            raise ValueError(f"{self.name} has no order, so min and max are not allowed")
        if knob(self.name).kind in {"flag", "choice"} and self.direction != "Both":
            raise ValueError(f"{self.name} has no order, so direction {self.direction} is not allowed")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"min <= max is required, got min={self.minimum:g}, max={self.maximum:g}")
        low, high = self.within
        if low is not None and high is not None and low > high:
            raise ValueError(f"{self.name} would be tuned from {low:g} to {high:g}; give both min and max")
        lowest, highest = field_bounds(knob(self.name).name)
        for label, value in zip(("min", "max"), bounds, strict=True):
            if value is not None and not lowest <= value <= highest:
                raise ValueError(f"{label} of {self.name} must be {lowest:g} to {highest:g}, got {value:g}")
        return self

    @property
    def within(self) -> tuple[float | None, float | None]:
        """Bounds of the tuner, inclusive: the given ones, the catalogue's for what is absent."""
        entry = knob(self.name)
        return (
            entry.minimum if self.minimum is None else self.minimum,
            entry.maximum if self.maximum is None else self.maximum,
        )


def field_bounds(name: str) -> tuple[float, float]:
    """Inclusive bounds of a KVCacheConfig field (snake_case), as the engine itself accepts them."""
    lowest, highest = float("-inf"), float("inf")
    for rule in KVCacheConfig.model_fields[name].metadata:
        lowest = max(lowest, getattr(rule, "ge", None) or getattr(rule, "gt", None) or lowest)
        highest = min(highest, getattr(rule, "le", None) or getattr(rule, "lt", None) or highest)
    return lowest, highest


class Budgets(Part):
    """Limits on what tuning may cost."""

    reversals_per_knob_6h: int = Field(
        2,
        alias="reversalsPerKnob6h",
        ge=0,
        le=16,
        description="Reverted changes of one knob within six hours after which kvpilot no longer changes it.",
    )
    restarts_per_day: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="Restarts of replicas during a change, within a day, after which no experiment begins.",
    )
    cache_lost_per_day: Bytes | None = Field(
        None,
        description="Cache that pushes may drop within a day, such as 20Gi; then no knob of the cache "
        "changes, except to relieve memory.",
    )
    max_gpus: int | None = Field(
        None,
        alias="maxGPUs",
        ge=1,
        le=100_000,
        description="GPUs of all replicas together at most, by the template's limits of nvidia.com/gpu.",
    )


class Tuning(Part):
    """What kvpilot may do by itself."""

    mode: Annotated[Literal["Off", "Recommend", "Approve", "Auto"], Quoted] = Field(
        "Auto",
        description='"Off" measures only, Recommend says what it would do, Approve asks before it does it, '
        'Auto does it. Quote "Off".',
    )
    pace: Literal["Fast", "Standard"] = Field(
        "Standard", description="Fast shortens every window, for demos and tests."
    )
    knobs: tuple[KnobRange, ...] = Field(
        (),
        max_length=32,
        description="Bounds by knob; absent ones have the catalogue's.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    disabled_rules: tuple[RuleName, ...] = Field(
        (),
        max_length=32,
        description="Names of rules that are left out.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    single_replica: Literal["Recommend", "BeforeAfter"] = Field(
        "Recommend",
        description="With one replica there is no control: recommend, or judge before and after (unproven).",
    )
    recycle_outliers: bool = Field(
        False,
        description="Replace a replica that is slower, fails more or leaks memory by itself; not for a cold "
        "cache.",
    )
    budgets: Budgets = Field(default_factory=Budgets, description="Limits on what tuning may cost.")
    maintenance_windows: tuple[RecurringWindow, ...] = Field(
        (),
        max_length=16,
        description="Experiments begin only while one of these is open; none: at any time. More capacity, "
        "relief of memory, overrides and bounds wait for no window.",
    )

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [item.name for item in self.knobs]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"knobs: {', '.join(repeated)} given more than once")
        return self


class Scaling(Part):
    """Bounds of the number of replicas that kvpilot chooses."""

    model_config = rules(("self.min <= self.max", "min <= max is required"))

    minimum: int = Field(alias="min", ge=1, le=1000, description="Least number of replicas, in every mode.")
    maximum: int = Field(alias="max", ge=1, le=1000, description="Largest number of replicas, in every mode.")
    direction: Literal["Both", "OutOnly", "InOnly"] = Field(
        "Both", description="Which way kvpilot may scale by itself."
    )
    schedules: tuple[ScalingSchedule, ...] = Field(
        (), max_length=16, description="Windows with other bounds; of several open ones the highest count."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.minimum > self.maximum:
            raise ValueError(f"min <= max is required, got min={self.minimum}, max={self.maximum}")
        for index, item in enumerate(self.schedules):
            if item.maximum is None and item.minimum > self.maximum:
                raise ValueError(
                    f"schedules.{index}.min must be at most scaling.max {self.maximum}, unless it has its "
                    f"own max, got {item.minimum}"
                )
        return self


class Rollout(Part):
    """How pods are replaced and how long a leaving one may finish its requests."""

    model_config = rules(
        (
            "self.maxSurge > 0 || self.maxUnavailable > 0",
            "maxSurge and maxUnavailable must not both be 0: no rollout could ever move",
        )
    )

    max_surge: int = Field(0, ge=0, le=1000, description="Extra pods during a rollout; 0 needs no spare GPU.")
    max_unavailable: int = Field(1, ge=0, le=1000, description="Pods that may be missing during a rollout.")
    drain_seconds: int = Field(
        120, ge=1, le=3600, description="Longest time a leaving pod finishes its requests, s."
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.max_surge == 0 and self.max_unavailable == 0:
            raise ValueError("maxSurge and maxUnavailable must not both be 0: no rollout could ever move")
        return self


class MetricsSource(Part):
    """Where measurements come from."""

    source_ref: str = Field(
        "default",
        pattern=NAME_PATTERN,
        max_length=NAME_LIMIT,
        description="Name of a source that the operator's owner configured.",
    )


def _require_mappings(where: str, items: Any) -> None:
    if items is not None and not (isinstance(items, list) and all(isinstance(item, dict) for item in items)):
        raise ValueError(f"{where}: must be a list of mappings, got {items!r:.80}")


class Template(BaseModel):
    """Overrides of the pod template. Lists of containers, env, volumes, ports merge by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metadata: dict[str, Any] = Field(default_factory=dict)
    spec: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _named_containers(self) -> Self:
        for kind in ("containers", "initContainers"):
            items = self.spec.get(kind) or []
            if not (isinstance(items, list) and all(isinstance(i, dict) and i.get("name") for i in items)):
                raise ValueError(f"spec.{kind}: must be a list of containers that each have a name")
            for item in items:
                for field in ("env", "ports", "volumeMounts"):
                    _require_mappings(f"spec.{kind}[{item['name']}].{field}", item.get(field))
        _require_mappings("spec.volumes", self.spec.get("volumes"))
        return self


class DeploymentSpec(Part):
    """What a user asks for."""

    model_config = rules(
        ("has(self.scaling) != has(self.replicas)", "exactly one of scaling and replicas is required")
    )

    profile: Literal["development", "production", "highPerformance"] = Field(
        "production", description="Objectives for everything that `objectives` leaves out."
    )
    objectives: Objectives = Field(
        default_factory=Objectives, description="Overrides of the profile's objectives."
    )
    engine: Engine = Field(default_factory=Engine, description="The engine and its base configuration.")
    tuning: Tuning = Field(default_factory=Tuning, description="What kvpilot may do by itself.")
    scaling: Scaling | None = Field(None, description="kvpilot chooses the number of replicas.")
    replicas: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="A person or another autoscaler chooses the number, also through /scale.",
    )
    template: Template = Field(
        default_factory=Template,
        description="Overrides of the pod template: containers, env, volumes and ports merge by name, "
        "volumeMounts by mountPath, all else replaces.",
    )
    rollout: Rollout = Field(default_factory=Rollout, description="How pods are replaced.")
    metrics: MetricsSource = Field(default_factory=MetricsSource, description="Where measurements come from.")

    @model_validator(mode="after")
    def _one_actuator(self) -> Self:
        if (self.scaling is None) == (self.replicas is None):
            raise ValueError("exactly one of scaling and replicas is required")
        return self


class Metadata(BaseModel):
    """Name and namespace of an object; what else Kubernetes keeps there passes through."""

    model_config = ConfigDict(
        frozen=True, extra="allow", alias_generator=Part.model_config["alias_generator"]
    )

    name: str = Field(pattern=NAME_PATTERN, max_length=NAME_LIMIT)
    namespace: str = "default"
    uid: str = ""
    generation: int = 0


class Resource(Part):
    """An object of the API server, or of a file."""

    @classmethod
    def parse(cls, document: Mapping[str, Any], source: str = "") -> Self:
        """Validate an object as it stands; the engine's configuration gives no warnings here.

        Raises:
            ManifestError: one line per fault, each naming field, value and what is allowed.
        """
        for field, expected in (("apiVersion", API_VERSION), ("kind", cls.__name__)):
            if document.get(field) != expected:
                raise ManifestError([f"{field}: must be {expected}, got {document.get(field)!r}"], source)
        try:
            return cls.model_validate(dict(document), context=QUIET)
        except ValidationError as error:
            raise ManifestError(manifest_errors(error, cls), source) from None


class KVCacheDeployment(Resource):
    """Engines that serve one model, and the objectives they are kept inside."""

    api_version: Literal["kvpilot.io/v1alpha1"]
    kind: Literal["KVCacheDeployment"]
    metadata: Metadata
    spec: DeploymentSpec
    status: dict[str, Any] = Field(default_factory=dict)
