"""State of the tuner between two decisions. It is stored in the status of the resource and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

MAX_HOLDS, MAX_BLOCKED_VALUES, MAX_REVERSALS, MAX_MARKS, MAX_REPORTED = 5, 16, 16, 10, 12
MAX_PENDING, MAX_HANDLED, MAX_GENERATIONS = 2, 8, 10
MAX_SPENT, MAX_LONGEST, MAX_EXPECTED = 8, 4, 2
"""Entries that each list of the state holds at most; the newest stay."""

MAX_CONTROLS = 8
"""Replicas that a canary is compared with. The variance of the log ratio is v / canaries + v / controls: with
one canary and eight controls, its standard error is 6% above that against infinitely many controls."""


class Phase(StrEnum):
    """``status.tuning.state``."""

    OBSERVE = "Observe"
    CANARY = "Canary"  #: the candidate is being pushed to the canary, later to half of its controls
    SETTLE = "Settle"  #: the canary runs it; its effect is not judged yet
    VERIFY = "Verify"  #: both arms are compared
    PROMOTE = "Promote"  #: accepted: pushed to all replicas, then written to the ConfigMap
    REVERT = "Revert"  #: reverted: every replica goes back to the ConfigMap
    WATCH = "Watch"  #: promoted, and still compared with how it was before
    COOLDOWN = "Cooldown"
    HOLD = "Hold"
    EMERGENCY = "Emergency"


@dataclass(frozen=True)
class KnobChange:
    """One field of a change; values as they stand in the configuration (camelCase name)."""

    knob: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Measure:
    """One measure of an arm: ``bad`` out of ``of``, e.g. requests beyond an edge out of all judged ones.

    Ratios of continuous amounts have the same form (seconds per request, missed tokens per token looked up).
    """

    name: str
    bad: float
    of: float

    @property
    def share(self) -> float | None:
        """``bad / of``; None where there is nothing to divide by."""
        return self.bad / self.of if self.of > 0 else None


@dataclass(frozen=True)
class Effect:
    """A log ratio of two arms, candidate over control, and its variance."""

    log_ratio: float
    variance: float


@dataclass(frozen=True)
class StepRate:
    """Row-steps per second of stepping, and the requests' worth of them that show it; zeros if unknown.

    ``rows``: the most rows that were at work at once for long enough to show a rate (a bucket of rows).
    ``computed``, ``prefill_s``: prompt tokens computed per row-step (None if the engines do not count them),
    and the seconds that they took.
    """

    rate: float = 0.0
    requests: float = 0.0
    rows: float = 0.0
    computed: float | None = 0.0
    prefill_s: float = 0.0


@dataclass(frozen=True)
class Tally:
    """Differences of two arms over intervals of equal length: number, mean, sum of squared deviations.

    ``at`` is the end of the last interval, s since the epoch; ``requests`` those of the smaller arm so far.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    requests: float = 0.0
    at: float = 0.0

    def with_interval(self, difference: float, requests: float, at: float) -> Tally:
        """The tally with one more interval (Welford's update)."""
        count = self.count + 1
        mean = self.mean + (difference - self.mean) / count
        squares = self.squares + (difference - self.mean) * (difference - mean)
        return Tally(count, mean, squares, self.requests + requests, at)


@dataclass(frozen=True)
class Scatter:
    """Failed requests by cell, as an interval or a replica: number of cells, and sums over them.

    ``bad`` of ``of`` requests failed; ``squares`` sums bad^2 / of. ``at`` is the end of the last interval, s
    since the epoch.
    """

    count: int = 0
    bad: float = 0.0
    of: float = 0.0
    squares: float = 0.0
    at: float = 0.0

    def with_cell(self, bad: float, of: float, at: float = 0.0) -> Scatter:
        """The sums with one more cell; one without requests is none, and no more than all of them failed."""
        if of <= 0:
            return replace(self, at=at)
        bad = min(max(0.0, bad), of)
        return Scatter(self.count + 1, self.bad + bad, self.of + of, self.squares + bad * bad / of, at)

    @property
    def chi_square(self) -> float:
        """Pearson's statistic of equal shares; its mean is ``count - 1`` for independent requests."""
        if not 0 < self.bad < self.of:
            return 0.0
        return max(0.0, self.squares * self.of / self.bad - self.bad) / (1 - self.bad / self.of)


@dataclass(frozen=True)
class ReplicaRef:
    """A replica of an experiment: the UID identifies it, the name is for people and outlives the replica."""

    uid: str
    name: str


@dataclass(frozen=True)
class Change:
    """The change in flight.

    Attributes:
        id: of its decision.
        values: the leading knob first, then those that go with it.
        generation: the name of the candidate configuration; the ConfigMap gets it on promotion.
        phase_since: when the present phase began, s since the epoch.
        canary: the replica that runs it first; None for an emergency, which goes to all replicas at once.
        controls: the replicas it is compared with, drawn from all others; () when there is one replica
            (before/after).
        restarts: restarts of all replicas of both arms at the start; more of them abort the change.
        objective: the objective whose breach it should cure (p50, p95, p99, memory, hitRate, ...).
        verdict: of a change that is being promoted or reverted, e.g. Promoted, Harmful, NoGain, Aborted(...).
        before: what a before/after change is compared with; () where controls run beside the canary.
        why: what was found when it began, one clause with figures.
        approved_by: who approved it in mode Approve; "" where kvpilot began it by itself.
        measure: what the arms are compared by: ``capacity``, or a measure of requests or of memory.
        ratio: predicted step rate over the present one, or the least that is left of it; 0 where it stays.
        seed: of the draw that chose the canary and the controls.
        measured_from: since when samples of the canary show the candidate, s since the epoch; 0 before.
        widened: controls that run the candidate by now, beside the canary.
        drained: True once the backlog of the candidate's replicas is gone: demand alone limits them then.
        rate_before, errors_before, judged_before: step rate, share of errors, and requests that show it, of
            all replicas before it.
        difference_before: what the arms differed by before it; None if that could not be measured.
        tally: intervals of the verification so far.
        work, work_before: the same for the time in work, where another measure is to improve.
        scatter_before, scatter: faults by cell: of all replicas before it and of the controls since, and of
            the candidate's replicas.
        crossed_at: when the arms of two replicas were swapped, s since the epoch; 0 if they were not.
        deadline: when the verification ends without a verdict, s since the epoch; 0 before it began.
        unseen_since: since when the arms cannot be observed, s since the epoch; 0 while they can.
    """

    id: str
    rule: str
    values: tuple[KnobChange, ...]
    epoch: int
    generation: int
    started_at: float
    phase_since: float
    canary: ReplicaRef | None
    controls: tuple[ReplicaRef, ...]
    restarts: int
    objective: str
    predicted_gain: float
    verdict: str = ""
    before: tuple[Measure, ...] = ()
    why: str = ""
    approved_by: str = ""
    measure: str = ""
    ratio: float = 0.0
    seed: int = 0
    measured_from: float = 0.0
    widened: tuple[ReplicaRef, ...] = ()
    drained: bool = False
    rate_before: StepRate = StepRate()
    errors_before: float = 0.0
    judged_before: float = 0.0
    difference_before: Effect | None = None
    tally: Tally = Tally()
    work: Tally = Tally()
    work_before: Effect | None = None
    scatter_before: Scatter = Scatter()
    scatter: Scatter = Scatter()
    crossed_at: float = 0.0
    deadline: float = 0.0
    unseen_since: float = 0.0

    @property
    def candidates(self) -> frozenset[str]:
        """UIDs of the replicas that run the candidate and are measured."""
        return frozenset({self.canary_uid, *(item.uid for item in self.widened)})

    @property
    def others(self) -> frozenset[str]:
        """UIDs of the replicas that it is compared with."""
        return frozenset(self.control_uids) - self.candidates

    @property
    def everywhere(self) -> bool:
        """True if all controls run the candidate: then all other replicas do as well."""
        return bool(self.widened) and not self.others

    @property
    def canary_uid(self) -> str:
        """UID of the canary; "" without one."""
        return "" if self.canary is None else self.canary.uid

    @property
    def control_uids(self) -> tuple[str, ...]:
        """UIDs of the controls."""
        return tuple(item.uid for item in self.controls)


@dataclass(frozen=True)
class Watch:
    """A change that runs on all replicas and is still compared with how it was before.

    Attributes:
        id: of the decision.
        values: what was changed; a change of the tuner is taken back if it does harm.
        since, until: span of the watch, s since the epoch.
        rate_before, errors_before, judged_before: of the change, see ``Change``.
        own: False for the user's edit, which is reported and never taken back.
        ratio: predicted step rate over the one before, or the least that is left of it; 0 where it stays.
        memory_before: memory ratio that an emergency was to lower; 0 for other changes.
        scatter_before, scatter: faults by cell before it, see ``Change``; for the user's edit all failed
            requests by interval, before it and since.
        arrivals_before: requests/s per replica that were seen before the user's edit; 0 where errors that
            the load can make are not judged.
    """

    id: str
    rule: str
    values: tuple[KnobChange, ...]
    since: float
    until: float
    rate_before: StepRate
    errors_before: float
    judged_before: float = 0.0
    own: bool = True
    ratio: float = 0.0
    memory_before: float = 0.0
    scatter_before: Scatter = Scatter()
    scatter: Scatter = Scatter()
    arrivals_before: float = 0.0


@dataclass(frozen=True)
class Pending:
    """A remedy that waits for an approval in mode Approve.

    Attributes:
        id: of the decision that proposed it; an approval names it.
        values: the knobs that it changes; () for a number of replicas.
        replicas: the number that it asks for; 0 for knobs.
        why: what was found, one clause with figures.
        since, expires: s since the epoch.
        ratio: of its proposal, see ``Change``.
        lapsing_since: since when its rule no longer proposes it; 0 while it does.
        approved_by: who approved a number of replicas that is not observed yet.
    """

    id: str
    rule: str
    values: tuple[KnobChange, ...]
    replicas: int
    objective: str
    predicted_gain: float
    why: str
    since: float
    expires: float
    ratio: float = 0.0
    lapsing_since: float = 0.0
    approved_by: str = ""

    @property
    def of_replicas(self) -> bool:
        """True if it changes the number of replicas, and no knob."""
        return not self.values


PIN = "pin:"
"""Prefix of the decision of an overlay entry that an override pins; the name of the override follows."""


@dataclass(frozen=True)
class OverlayEntry:
    """One knob that differs from the user's base value, and the base value it was based on."""

    knob: str
    based_on: Any
    value: Any
    decision: str

    @property
    def pinned(self) -> bool:
        """True if an override holds it; such an entry stands behind the tuned one of its knob."""
        return self.decision.startswith(PIN)


@dataclass(frozen=True)
class Generation:
    """A configuration that was promoted, to which an override can go back.

    Attributes:
        at: when it was noted, s since the epoch.
        decision, verdict: what made it; its record holds the evidence.
        knobs: the tuned knobs as a JSON object; the rest is the user's base.
    """

    number: int
    at: float
    decision: str
    verdict: str
    knobs: str


@dataclass(frozen=True)
class Spent:
    """What changes have cost: ``restarts`` of replicas, or bytes of cache (``cacheLost``), since ``at``."""

    what: str
    at: float
    amount: float


IN_USE, MEMORY_USED = "use", "memory"
"""What is predicted of actions without arms: the share of their capacity that replicas are in use for, and
the memory ratio."""


@dataclass(frozen=True)
class Prediction:
    """What a measure (``IN_USE`` or ``MEMORY_USED``) should be after an action, and between which values."""

    measure: str
    value: float
    low: float
    high: float

    @staticmethod
    def rounded(measure: str, *shares: float) -> Prediction:
        """With shares to a hundredth of a percent: the status is small."""
        return Prediction(measure, *(round(share, 4) for share in shares))

    @property
    def text(self) -> str:
        """``62% (54% to 71%)``."""
        return f"{self.value:.0%} ({self.low:.0%} to {self.high:.0%})"

    @property
    def evidence(self) -> dict[str, Any]:
        """For the record of the action, and for that of its result."""
        return {
            "measure": self.measure,
            "predicted": self.value,
            "predictedLow": self.low,
            "predictedHigh": self.high,
        }


@dataclass(frozen=True)
class Expected:
    """The prediction of an action without arms, until its effect is measured.

    Attributes:
        id, rule: of its decision.
        what: the change in words.
        at: when it was made, s since the epoch.
        replicas: the number that it asked for; 0 for knobs.
        since: since when it is in force, s since the epoch; 0 before.
    """

    id: str
    rule: str
    what: str
    prediction: Prediction
    at: float
    replicas: int = 0
    since: float = 0.0

    @property
    def measure(self) -> str:
        """What is predicted."""
        return self.prediction.measure


@dataclass(frozen=True)
class LongestRequest:
    """What the longest request took that engines reported, tokens, whole blocks; a restart makes one forget.

    ``until`` is when it is forgotten, a day after no engine reported it any more; 0 while one does.
    """

    tokens: int
    until: float = 0.0


@dataclass(frozen=True)
class Hold:
    """A reason why no change is made, and since when."""

    reason: str
    message: str
    since: float


@dataclass(frozen=True)
class BlockedValue:
    """A value that did harm or did not help, and until when it is blocked."""

    knob: str
    value: Any
    until: float


@dataclass(frozen=True)
class Reversal:
    """A change that was reverted; the flap budget counts them."""

    knob: str
    at: float


@dataclass(frozen=True)
class ReplicaMark:
    """Replicas needed at one time; the highest mark of the look-back counts for a scale-in."""

    at: float
    replicas: int


@dataclass(frozen=True)
class Strain:
    """Requests waited although the curve showed room: replicas are planned for less use until a time.

    Attributes:
        use: share of their capacity, 0 to 1.
        until: s since the epoch.
    """

    use: float
    until: float


@dataclass(frozen=True)
class Reported:
    """Something that was reported, so that it is not reported at every reconcile."""

    key: str
    at: float


@dataclass(frozen=True)
class TuningState:
    """The whole state. ``epoch`` and ``last_generation`` never decrease.

    ``boosted`` is the number of replicas that a boost asked for; they go one by one after its expiry.
    ``rules_hash`` is the digest of the rules that acted last.
    ``handled`` names overrides in force that were carried out or refused, which happens once.
    """

    phase: Phase = Phase.OBSERVE
    epoch: int = 0
    last_generation: int = 0
    next_decision: int = 1
    overlay: tuple[OverlayEntry, ...] = ()
    change: Change | None = None
    cooldown_until: float = 0.0
    holds: tuple[Hold, ...] = ()
    blocked_values: tuple[BlockedValue, ...] = ()
    reversals: tuple[Reversal, ...] = ()
    scale_down: tuple[ReplicaMark, ...] = ()
    reported: tuple[Reported, ...] = ()
    boosted: int = 0
    pending: tuple[Pending, ...] = ()
    handled: tuple[str, ...] = ()
    generations: tuple[Generation, ...] = ()
    rules_hash: str = ""
    spent: tuple[Spent, ...] = ()
    watch: Watch | None = None
    strain: Strain | None = None
    longest: tuple[LongestRequest, ...] = ()
    expected: tuple[Expected, ...] = ()
