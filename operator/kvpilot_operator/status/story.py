"""One decision as a colleague would tell it: a few sentences from its whole record. Pure.

What a record of an older operator does not hold is left out; its summary is always there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from kvpilot_engine.contract.knobs import Price
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.context import format_value, sentence

Json = Mapping[str, Any]

MAX_LINES = 20
"""Lines of one decision, its heading included."""

NAMED = 5
"""Replicas that are named; of more only the number."""

_MEANING = {reason.name: reason.meaning for reason in reasons.REASONS}

_UNRELATED = frozenset({reasons.NOT_AT_FAULT, reasons.NOT_EFFECTIVE})
"""Rejections that say nothing of this decision: the remedy is for something else."""

_BY_FIGURES = frozenset({reasons.BREACH_GONE, reasons.TOO_FEW_REQUESTS, reasons.INCONCLUSIVE})
"""Ends whose effect is figures; that of the others is what happened."""

_QUANTILES = ("p50", "p95", "p99")

_DIAGNOSED = frozenset({"Started", "Recommended", "Proposed", "ScaledOut"})
"""Outcomes that follow from the diagnosis in their record, as in ``local/report.html``."""


def story(record: Json) -> tuple[str, ...]:
    """The sentences of a decision, at most ``MAX_LINES`` - 1."""
    lines = [*_FORMATS.get(str(record["outcome"]), _plain)(record)]
    if price := record.get("price"):
        lines.append(f"It costs {Price(**price).words}.")
    if record["outcome"] in _DIAGNOSED:
        lines = [*lines, *_left(record)]
    return tuple(lines[: MAX_LINES - 1])


def _plain(record: Json) -> Iterator[str]:
    yield str(record.get("summary", "")).replace("; generation ", ", as generation ")


def _caused(record: Json) -> Iterator[str]:
    """What was wrong and where the time went, then the summary."""
    yield from _fault(record)
    yield from _time(record)
    yield from _plain(record)


def _fault(record: Json) -> Iterator[str]:
    diagnosis = record.get("diagnosis") or {}
    if diagnosis.get("objective"):
        said = str(diagnosis.get("message") or diagnosis["reason"]).replace(" is ", " was ")
        yield punctuated(said if said.startswith(_QUANTILES) else sentence(said))


def _time(record: Json) -> Iterator[str]:
    """Where the time of a request went, if a stage is at fault."""
    diagnosis = record.get("diagnosis") or {}
    largest = sorted(diagnosis.get("stages") or (), key=lambda item: -float(item["share"]))[:3]
    shares = [
        f"{item['stage'].replace('_', ' ')} ({float(item['share']):.0%})"
        for item in largest
        if round(float(item["share"]), 2) > 0
    ]
    if diagnosis.get("stage") and len(shares) > 1:
        yield f"The time of a request went into {listing(shares)}."


def _found(record: Json) -> Iterator[str]:
    """What speaks for a change, and where the time went."""
    objective = (record.get("diagnosis") or {}).get("objective")
    what = f"{objective} missed its target" if objective else "What speaks for a change"
    yield f"{what}: {clauses(record['evidence']['why'])}."
    yield from _time(record)


def _suggested(record: Json) -> Iterator[str]:
    """A change that waits for a person; its summary begins with the finding."""
    why = str((record.get("evidence") or {}).get("why", ""))
    found, _, left = str(record.get("summary", "")).partition(f"{sentence(why)}; ")
    if not why or found:
        yield from _caused(record)
        return
    yield from _found(record)
    yield sentence(left)


def _started(record: Json) -> Iterator[str]:
    evidence = record.get("evidence") or {}
    if "why" not in evidence:
        yield from _caused(record)
        return
    yield from _found(record)
    controls = [str(name) for name in record.get("controls") or ()]
    against = f"with {replicas(controls)} as controls" if controls else "with its own past to compare with"
    gain = f"; it should gain {float(evidence['predictedGain']):.0%}" if "predictedGain" in evidence else ""
    yield f"So {record['canary']} tries {changes(record)}, {against}{gain}."
    _, approved, who = str(record.get("summary", "")).partition("Approved by ")
    if approved:
        yield f"{approved}{who}"


def _promoted(record: Json) -> Iterator[str]:
    effect = (record.get("evidence") or {}).get("effect")
    if not effect:
        yield from _plain(record)
        return
    where = f" on {record['canary']}" if record.get("canary") else ""
    yield f"{sentence(changes(record))} helped{where}: {effect}."
    yield f"Every replica gets it now, as generation {record['generation']}."


def _reverted(record: Json) -> Iterator[str]:
    evidence = record.get("evidence") or {}
    verdict, effect = str(evidence.get("verdict", "")), evidence.get("effect")
    if not effect:
        yield from _plain(record)
        return
    where = f" on {record['canary']}" if record.get("canary") else ""
    known = {reasons.HARMFUL: "did harm", reasons.NO_GAIN: "did not help enough"}
    found = known.get(verdict, "proved nothing")
    yield f"{sentence(changes(record))} {found}{where}: {effect}."
    first = (record.get("changes") or [{}])[0]
    value = f"{first.get('knob')} {format_value(first.get('after'))}"
    again = f"{value} is not tried again {'for a day' if verdict in known else 'for a while'}"
    yield f"Generation {record['generation']} runs again, and {again}."


def _aborted(record: Json) -> Iterator[str]:
    evidence = record.get("evidence") or {}
    verdict, effect = str(evidence.get("verdict", "")), evidence.get("effect")
    if not effect:
        yield from _plain(record)
        return
    meaning = _MEANING.get(verdict, "").removeprefix("Aborted: ").rstrip(".")
    why = meaning[:1].lower() + meaning[1:] if verdict in _BY_FIGURES else str(effect)
    where = f" on {record['canary']}" if record.get("canary") else ""
    yield f"Trying {changes(record)}{where} was stopped: {why} ({verdict})."
    if verdict in _BY_FIGURES:
        yield f"Up to then, {effect}."
    yield f"So nothing is concluded, and generation {record['generation']} runs again."


def _emergency(record: Json) -> Iterator[str]:
    why = (record.get("evidence") or {}).get("why")
    if not why:
        yield from _plain(record)
        return
    yield f"{sentence(clauses(why))}, which leaves no time to try anything on one replica."
    yield f"So all of them got {changes(record)} at once, as generation {record['generation']}."
    yield f"{_predicted(record, 'Memory should then be at')}It is taken back if memory does not fall."


def _scaled(record: Json) -> Iterator[str]:
    why, sizes = (record.get("evidence") or {}).get("why"), record.get("replicas")
    if not why or not sizes:
        yield from _caused(record) if record["outcome"] == "ScaledOut" else _plain(record)
        return
    if record["outcome"] == "ScaledOut":
        yield from _fault(record)
        yield from _time(record)
    yield f"{sentence(clauses(why))}, so the number of replicas goes from {sizes[0]} to {sizes[1]}."
    if "predicted" in record["evidence"]:
        yield _predicted(record, "The share of their capacity in use should then be").rstrip()


def _predicted(record: Json, begins: str) -> str:
    """What should come of an action without arms, and a space; "" if its record does not say."""
    evidence = record["evidence"]
    if "predicted" not in evidence:
        return ""
    value, low, high = (float(evidence[key]) for key in ("predicted", "predictedLow", "predictedHigh"))
    return f"{begins} {value:.0%}, within {low:.0%} and {high:.0%}. "


def _left(record: Json) -> Iterator[str]:
    """Which remedies would have been for this, and why they were not taken."""
    by_reason: dict[str, list[str]] = {}
    for item in record.get("rejected") or ():
        if item["reason"] not in _UNRELATED and item["rule"] != "replicas-down":
            by_reason.setdefault(str(item.get("message") or item["reason"]), []).append(str(item["rule"]))
    if by_reason:
        stated = "; ".join(f"{listing(rules)}, because {why}" for why, rules in by_reason.items())
        yield f"Not chosen: {stated}."


_FORMATS: Mapping[str, Callable[[Json], Iterable[str]]] = MappingProxyType(
    {
        "Started": _started,
        "Recommended": _suggested,
        "Proposed": _suggested,
        "Promoted": _promoted,
        "Reverted": _reverted,
        "Aborted": _aborted,
        "Emergency": _emergency,
        "ScaledOut": _scaled,
        "ScaledIn": _scaled,
    }
)


def changes(record: Json) -> str:
    """``numWorkers 2 -> 6 and batchSize 2 -> 6``."""
    return listing(
        [
            f"{item['knob']} {format_value(item['before'])} -> {format_value(item['after'])}"
            for item in record.get("changes") or ()
        ]
    )


def replicas(names: Sequence[str]) -> str:
    """Names of a few replicas, the number of many."""
    return listing(names) if len(names) <= NAMED else f"{len(names)} other replicas"


def listing(items: Sequence[str]) -> str:
    """``a, b and c``."""
    *first, last = items or ("",)
    return f"{', '.join(first)} and {last}" if first else last


def clauses(text: str) -> str:
    """Clauses that a semicolon parts, as one."""
    return ", and ".join(text.rstrip(".").split("; "))


def punctuated(text: str) -> str:
    """A text that ends as a sentence does."""
    return text if text.endswith((".", "!", "?")) else f"{text}."
