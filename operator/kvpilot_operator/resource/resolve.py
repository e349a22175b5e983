"""What a spec means: profile and overrides merged, percentages parsed, bounds complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kvpilot_engine.contract import CATALOGUE, KVCacheConfig, Notice
from kvpilot_engine.contract.config import QUIET
from kvpilot_engine.contract.wording import counted
from kvpilot_operator.resource import model as models
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.resource.fields import ratio_of
from kvpilot_operator.resource.quantity import parse_bytes, parse_quantity
from kvpilot_operator.tuning.pace import PACES
from kvpilot_operator.tuning.policy import KnobBounds, Objectives, Policy, Scaling, ScheduledBounds

GPU = "nvidia.com/gpu"
"""The resource name of a GPU in a template's limits."""

ATTAINMENT: Mapping[str, float] = MappingProxyType({"p50": 0.5, "p95": 0.95, "p99": 0.99})
"""Share of the judged requests that must be within the edge of each latency objective."""


@dataclass(frozen=True)
class Profile:
    """Objectives of a profile: latency edges in ms, requests/s, ratios."""

    latency_ms: Mapping[str, int]
    throughput: int
    floor: int
    hit_rate: float
    memory: float
    errors: float


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "development": Profile({"p50": 200}, 20, 10, 0.5, 0.9, 0.05),
        "production": Profile({"p50": 100, "p95": 500, "p99": 1000}, 100, 50, 0.7, 0.8, 0.01),
        "highPerformance": Profile({"p50": 50, "p95": 200, "p99": 1000}, 200, 100, 0.8, 0.7, 0.01),
    }
)


def policy_of(spec: models.DeploymentSpec, pace_scale: float = 1.0) -> Policy:
    """Everything that ``decide`` must obey. ``pace_scale`` multiplies every duration but the scrape interval.

    Raises:
        ManifestError: the objectives contradict each other once the profile's are filled in, or the least
            number of replicas needs more GPUs than the budget allows.
    """
    tuning = spec.tuning
    return Policy(
        objectives=objectives_of(spec),
        mode=tuning.mode,
        pace=PACES[tuning.pace].scaled(pace_scale),
        bounds=_bounds(tuning.knobs),
        scaling=_scaling(spec),
        disabled_rules=frozenset(tuning.disabled_rules),
        single_replica=tuning.single_replica,
        recycle_outliers=tuning.recycle_outliers,
        reversals_per_knob_6h=tuning.budgets.reversals_per_knob_6h,
        restarts_per_day=tuning.budgets.restarts_per_day,
        cache_lost_per_day=_bytes(tuning.budgets.cache_lost_per_day),
        maintenance=tuple(item.window for item in tuning.maintenance_windows),
    )


def base_config(spec: models.DeploymentSpec) -> KVCacheConfig:
    """The user's base values, with exactly the given fields set. Gives no warnings."""
    config = spec.engine.config
    given = {name: getattr(config, name) for name in config.model_fields_set}
    return KVCacheConfig.model_validate(given, context=QUIET)


def not_yet_effective(spec: models.DeploymentSpec) -> list[Notice]:
    """Given values that this version accepts and does not act on; field names in camelCase."""
    names = {name: info.alias or name for name, info in KVCacheConfig.model_fields.items()}
    return [Notice(names[n.field], n.message) for n in spec.engine.config.not_yet_effective()]


def objectives_of(spec: models.DeploymentSpec) -> Objectives:
    """The profile's objectives with the user's over them; latency in s, percentages as ratios.

    Raises:
        ManifestError: the latency limits are out of order.
    """
    profile, given = PROFILES[spec.profile], spec.objectives
    latency = given.latency or models.Latency()
    edges = {
        name: value if (value := getattr(latency, f"{name}_ms")) is not None else profile.latency_ms.get(name)
        for name in ATTAINMENT
    }
    limits = {name: value for name, value in edges.items() if value is not None}
    if list(limits.values()) != sorted(limits.values()):
        reported = ", ".join(f"{name}Ms={value}" for name, value in limits.items())
        raise ManifestError(
            [
                f"spec.objectives.latency: p50Ms <= p95Ms <= p99Ms is required, got {reported} "
                f"(what is not given comes from profile {spec.profile})"
            ]
        )
    target, floor = _throughput(profile, given.throughput)
    return Objectives(
        signal=latency.signal,
        latency={name: (value / 1000, ATTAINMENT[name]) for name, value in limits.items()},
        throughput=target,
        floor=floor,
        hit_rate=_ratio(given.hit_rate, profile.hit_rate),
        memory=_ratio(given.memory, profile.memory),
        errors=_ratio(given.errors, profile.errors),
    )


def _ratio(given: str | None, default: float) -> float:
    return default if given is None else ratio_of(given)


def _throughput(profile: Profile, given: models.Throughput | None) -> tuple[float, float]:
    if given is None:
        return profile.throughput, profile.floor
    return given.target, given.target / 2 if given.floor is None else given.floor


def _bounds(given: tuple[models.KnobRange, ...]) -> dict[str, KnobBounds]:
    """The catalogue's bounds, a user's own over them: those may be wider, within the field's."""
    ranges = {entry.resource_name: models.KnobRange(name=entry.resource_name) for entry in CATALOGUE}
    ranges.update({item.name: item for item in given})
    return {name: KnobBounds(name, *item.within, item.tune, item.direction) for name, item in ranges.items()}


def _bytes(quantity: str | None) -> int | None:
    return None if quantity is None else parse_bytes(quantity)


def _scaling(spec: models.DeploymentSpec) -> Scaling | None:
    limit = _gpu_limit(spec)
    least = spec.scaling.minimum if spec.scaling is not None else spec.replicas or 0
    if limit is not None and least > limit:
        budget = spec.tuning.budgets.max_gpus
        raise ManifestError(
            [
                f"spec.tuning.budgets.maxGPUs: {counted(least, 'replica')} with "
                f"{counted(gpus_of(spec), 'GPU')} each need {least * gpus_of(spec)}, got {budget}"
            ]
        )
    if (given := spec.scaling) is None:
        return None
    schedules = tuple(ScheduledBounds(item.window, item.minimum, item.maximum) for item in given.schedules)
    return Scaling(given.minimum, given.maximum, given.direction, schedules, limit, gpus=gpus_of(spec))


def gpus_of(spec: models.DeploymentSpec) -> int:
    """GPUs that one replica asks for: the limits of nvidia.com/gpu of all its containers.

    Raises:
        ManifestError: such a limit is no quantity.
    """
    total = 0
    for item in spec.template.spec.get("containers") or ():
        try:
            total += int(parse_quantity(str(((item.get("resources") or {}).get("limits") or {}).get(GPU, 0))))
        except (AttributeError, ValueError) as error:
            where = f"spec.template.spec.containers[{item['name']}].resources.limits"
            raise ManifestError([f"{where}: {GPU} must be a number of GPUs ({error})"]) from None
    return total


def _gpu_limit(spec: models.DeploymentSpec) -> int | None:
    """Replicas that the budget of GPUs allows; None without a budget or without GPUs."""
    budget, each = spec.tuning.budgets.max_gpus, gpus_of(spec)
    return budget // each if budget is not None and each else None
