"""Which overrides of a resource are in force now, and why the others are not. Pure.

The operator, local mode and the command line judge with the same function, so that a command refuses what the
operator would not obey.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvpilot_engine.contract.wording import counted
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.resource.override import KINDS, KVCacheOverride, OverrideSpec
from kvpilot_operator.resource.times import duration_s, moment, seconds_of
from kvpilot_operator.status.model import ConditionStatus, OverrideStatus
from kvpilot_operator.tuning.observation import Approval, Boost, Pin, Rollback

Json = Mapping[str, Any]

MESSAGE_LIMIT = 1024
"""Characters of a condition's message."""

IN_FORCE = "InForce"
CARRIED_OUT = "CarriedOut"
REFUSED = "Refused"
EXPIRED = "Expired"
INVALID = "Invalid"
NO_SUCH_TARGET = "NoSuchTarget"
CONTRADICTS = "Contradicts"
ABOVE_MAXIMUM = "AboveMaximum"
REPLICAS_FIXED = "ReplicasFixed"
NOT_PENDING = "DecisionNotPending"
DECISION_EXPIRED = "DecisionExpired"
NO_SUCH_GENERATION = "NoSuchGeneration"

REASONS: Mapping[str, str] = {
    IN_FORCE: "It is in force as a whole.",
    CARRIED_OUT: "An approval or a way back that is done; the override is deleted.",
    REFUSED: "The tuner cannot do it; `kvpilot history` shows why.",
    ABOVE_MAXIMUM: "A boost above spec.scaling.max; it is in force up to there.",
    EXPIRED: "It is no longer in force, and is deleted.",
    INVALID: "A value that no engine accepts, or a malformed field.",
    NO_SUCH_TARGET: "There is no KVCacheDeployment of that name in its namespace.",
    CONTRADICTS: "A newer override asks for something else.",
    REPLICAS_FIXED: "A boost of a resource with spec.replicas.",
    NOT_PENDING: "An approval of a decision that does not wait for one.",
    DECISION_EXPIRED: "An approval of a decision that was withdrawn.",
    NO_SUCH_GENERATION: "A way back to a generation that there is not.",
}
"""Reasons of the condition InForce of an override, and what they mean."""

ONCE = frozenset({"approve", "rollback"})
"""Kinds of overrides that are carried out once."""


@dataclass(frozen=True)
class Verdict:
    """Whether an override is in force, and why or why not, in one sentence.

    Attributes:
        reason: one of this module's reasons; one other than ``InForce`` on an override that is in force means
            that only a part of it is.
        expires_at: s since the epoch.
    """

    name: str
    kind: str
    in_force: bool
    reason: str
    message: str
    expires_at: float

    @property
    def over(self) -> bool:
        """True if it has nothing more to say, so that it is deleted.

        What is done once must not be done again when a newer override of its kind ends.
        """
        if self.reason == EXPIRED or (self.kind in ONCE and self.reason in {CARRIED_OUT, REFUSED}):
            return True
        return self.kind == "rollback" and self.reason == CONTRADICTS


@dataclass(frozen=True)
class Overrides:
    """What the overrides of one resource ask for now.

    Attributes:
        verdicts: of every override of the resource, oldest first, expired ones included.
    """

    paused_by: str = ""
    scaling_paused: bool = False
    boosts: tuple[Boost, ...] = ()
    pins: tuple[Pin, ...] = ()
    approvals: tuple[Approval, ...] = ()
    rollback: Rollback | None = None
    verdicts: tuple[Verdict, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the overrides in force."""
        return tuple(sorted(item.name for item in self.verdicts if item.in_force))

    @property
    def refused(self) -> tuple[Verdict, ...]:
        """Those that ask for something that is not done, or not all of it."""
        return tuple(
            item
            for item in self.verdicts
            if item.reason not in {IN_FORCE, CARRIED_OUT, EXPIRED} and not item.over
        )


def name_of(override: Json) -> str:
    """Its name; its generateName before the API server has made a name of it."""
    metadata = override["metadata"]
    return str(metadata.get("name") or metadata.get("generateName", ""))


def kind_of(override: Json) -> str:
    """What it asks for: one of ``KINDS``; "" for none."""
    return next((kind for kind in KINDS if kind in override["spec"]), "")


def created_at(override: Json) -> float:
    """When it was created, s since the epoch."""
    return seconds_of(override["metadata"].get("creationTimestamp"))


def expiry_of(override: Json) -> float:
    """When it stops being in force, s since the epoch."""
    spec = override["spec"]
    if "ttl" in spec:
        return created_at(override) + duration_s(spec["ttl"])
    return seconds_of(spec["expiresAt"])


def overrides_of(items: Iterable[Json], target: str, manifest: Json | None, now: float) -> Overrides:
    """What the overrides of ``target`` ask for now.

    Args:
        items: overrides of the namespace; those of other resources and those being deleted are left out.
        manifest: the resource with its status; None if there is none of that name.
        now: s since the epoch.
    """
    own = sorted(
        (i for i in items if i["spec"]["target"] == target and "deletionTimestamp" not in i["metadata"]),
        key=lambda item: (created_at(item), name_of(item)),
    )
    found = Overrides()
    for item in reversed(own):  # the newest first: an older one that contradicts it gives way
        found = _with(found, item, manifest, now)
    return replace(found, verdicts=found.verdicts[::-1])


def _with(found: Overrides, item: Json, manifest: Json | None, now: float) -> Overrides:
    """``found`` with one more override, and its verdict."""
    name, until = name_of(item), expiry_of(item)

    def judged(result: Overrides, reason: str, message: str, *, in_force: bool = False) -> Overrides:
        verdict = Verdict(name, kind_of(item), in_force, reason, message, until)
        return replace(result, verdicts=(*result.verdicts, verdict))

    if until <= now:
        return judged(found, EXPIRED, f"expired at {moment(until)}")
    try:
        spec = KVCacheOverride.parse(item).spec
    except ManifestError as error:
        return judged(found, INVALID, "; ".join(error.lines))
    if manifest is None:
        return judged(found, NO_SUCH_TARGET, f"there is no KVCacheDeployment {spec.target} in this namespace")
    if (fault := _fault(found, name, spec, manifest)) is not None:
        return judged(found, *fault)
    reason, message = (
        _answered(name, spec, manifest)
        or _limit(spec, manifest)
        or (IN_FORCE, f"in force until {moment(until)}")
    )
    # The tuner remembers an answer as long as it sees the override.
    return judged(_taken(found, name, spec, until), reason, message, in_force=reason != REFUSED)


def _fault(found: Overrides, name: str, spec: OverrideSpec, manifest: Json) -> tuple[str, str] | None:
    """Why an override is not obeyed: reason and message; None if it is."""
    if spec.pin is not None:
        for pin in found.pins:
            if pin.knob == spec.pin.knob and pin.value != spec.pin.value:
                what = f"{pin.name} is newer and pins {pin.knob} to {pin.value}"
                return CONTRADICTS, f"{what}, not to {spec.pin.value}"
    if spec.boost is not None and "scaling" not in manifest["spec"]:
        return REPLICAS_FIXED, "spec.replicas fixes the number of replicas; a boost needs spec.scaling"
    if spec.rollback is not None:
        return _no_rollback(found, name, spec.rollback.to, manifest)
    if spec.approve is not None:
        return _not_approvable(name, spec.approve.decision, manifest)
    return None


def _no_rollback(found: Overrides, name: str, to: int, manifest: Json) -> tuple[str, str] | None:
    if found.rollback is not None and found.rollback.to != to:
        return CONTRADICTS, f"{found.rollback.name} is newer and goes back to generation {found.rollback.to}"
    tuning = (manifest.get("status") or {}).get("tuning") or {}
    kept = [int(item["number"]) for item in tuning.get("generations") or ()]
    if to in kept or name in (tuning.get("handled") or ()):
        return None
    return (
        NO_SUCH_GENERATION,
        f"generation {to} is not kept; these are: {', '.join(map(str, kept)) or 'none'}",
    )


def _not_approvable(name: str, decision: str, manifest: Json) -> tuple[str, str] | None:
    """Why there is nothing to approve, by the mode and the decisions of the status."""
    mode = (manifest["spec"].get("tuning") or {}).get("mode", "Auto")
    if mode != "Approve":
        return NOT_PENDING, f"spec.tuning.mode is {mode}; only mode Approve waits for an approval"
    status = manifest.get("status") or {}
    tuning = status.get("tuning") or {}
    waiting = [str(item["id"]) for item in tuning.get("pending") or ()]
    begun = (tuning.get("change") or {}).get("id")
    if decision in {*waiting, begun} or name in (tuning.get("handled") or ()):
        return None
    now = f"pending now: {', '.join(waiting) or 'none'}"
    for item in reversed(status.get("decisions") or ()):
        if item["id"] == decision and item["outcome"] == "Withdrawn":
            return DECISION_EXPIRED, f"{decision} was withdrawn at {item['at']}; {now}"
    return NOT_PENDING, f"{decision} is not pending; {now}"


def _answered(name: str, spec: OverrideSpec, manifest: Json) -> tuple[str, str] | None:
    """What the tuner did with it: reason and message; None while it did nothing."""
    status = manifest.get("status") or {}
    if name not in ((status.get("tuning") or {}).get("handled") or ()):
        return None
    for item in status.get("decisions") or ():
        if item["outcome"] == "Refused" and f"Override {name} " in item["summary"]:
            return REFUSED, item["summary"].rstrip(".")
    if spec.kind in ONCE:
        return CARRIED_OUT, f"the {spec.kind} is carried out; kvpilot history shows it"
    return REFUSED, "the tuner refused it; kvpilot history shows why"


def _limit(spec: OverrideSpec, manifest: Json) -> tuple[str, str] | None:
    """What an override in force asks for and does not get: reason and message."""
    if spec.boost is None:
        return None
    maximum = int(manifest["spec"]["scaling"]["max"])
    if spec.boost.min_replicas <= maximum:
        return None
    asked = spec.boost.min_replicas
    return (
        ABOVE_MAXIMUM,
        f"asks for {counted(asked, 'replica')}; spec.scaling.max allows {maximum}, so it gets {maximum}",
    )


def _taken(found: Overrides, name: str, spec: OverrideSpec, until: float) -> Overrides:
    """``found`` with what an override in force asks for."""
    if spec.pause is not None:
        paused_by = name if not found.paused_by else min(name, found.paused_by)
        return replace(found, paused_by=paused_by, scaling_paused=found.scaling_paused or spec.pause.scaling)
    if spec.boost is not None:
        boosts = (*found.boosts, Boost(name, spec.boost.min_replicas, until))
        return replace(found, boosts=tuple(sorted(boosts, key=lambda boost: boost.name)))
    if spec.pin is not None:
        pin = Pin(name, spec.pin.knob, spec.pin.value, until)
        same = next((one for one in found.pins if one.knob == pin.knob), pin)
        others = (one for one in found.pins if one.knob != pin.knob)
        return replace(found, pins=(*others, max(same, pin, key=lambda one: one.expires_at)))
    if spec.approve is not None:
        approval = Approval(name, spec.approve.decision, spec.by)
        return replace(found, approvals=(*found.approvals, approval))
    if spec.rollback is not None and found.rollback is None:
        return replace(found, rollback=Rollback(name, spec.rollback.to, spec.by))
    return found


def end_of(override: Json, verdict: Verdict) -> tuple[Literal["Normal", "Warning"], str, str]:
    """What to report of an override that is over: kind and reason of the Event, one sentence."""
    spec = override["spec"]
    what = f"{kind_of(override)} of {spec['target']}" + (f" by {spec['by']}" if spec.get("by") else "")
    if verdict.reason == CARRIED_OUT:
        return "Normal", "OverrideCarriedOut", f"{what} was carried out"
    if verdict.reason == REFUSED:
        return "Warning", "OverrideRefused", verdict.message
    if verdict.reason == CONTRADICTS:
        return "Warning", "OverrideSuperseded", f"{what} is void: {verdict.message}"
    until = moment(verdict.expires_at)
    if verdict.expires_at <= created_at(override):
        return "Warning", "OverrideExpired", f"{what} had no effect: it was created after its end at {until}"
    return "Normal", "OverrideExpired", f"{what} ended at {until}"


def with_verdict(override: Json, verdict: Verdict, now: float) -> dict[str, Any]:
    """The override with the verdict in its status; equal to it if the verdict has not changed."""
    state: Literal["True", "False"] = "True" if verdict.in_force else "False"
    conditions = (override.get("status") or {}).get("conditions") or ()
    before: Json = next((item for item in conditions if item.get("type") == IN_FORCE), {})
    since = seconds_of(before["lastTransitionTime"]) if before.get("status") == state else int(now)
    condition = ConditionStatus(
        type=IN_FORCE,
        status=state,
        reason=verdict.reason,
        message=verdict.message[:MESSAGE_LIMIT],
        last_transition_time=since,
        observed_generation=int(override["metadata"].get("generation") or 0),
    )
    status = OverrideStatus(kind=verdict.kind, expires_at=verdict.expires_at, conditions=(condition,))
    return {**override, "status": status.model_dump(by_alias=True, mode="json")}
