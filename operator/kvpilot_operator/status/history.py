"""``kvpilot history``: every decision that is known of a resource, oldest first. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpilot_operator.resource.times import moment
from kvpilot_operator.status.model import Status

Json = Mapping[str, Any]


def parse_records(text: str) -> list[Json]:
    """Decision records of a JSON-lines text, without incomplete lines."""
    records: list[Json] = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and _is_record(record):
            records.append(record)
    return records


def _is_record(found: Json) -> bool:
    named = isinstance(found.get("id"), str) and isinstance(found.get("outcome"), str)
    return named and isinstance(found.get("at"), (int, float))


@dataclass(frozen=True)
class Entry:
    """One decision.

    Attributes:
        at: s since the epoch.
        generation: of the configuration that it made or went back to; None for none, or if only the summary
            in the status is kept.
        record: the whole record; None if only its summary is kept.
    """

    id: str
    at: float
    rule: str
    outcome: str
    summary: str
    generation: int | None = None
    record: Json | None = None

    def as_json(self) -> dict[str, Any]:
        """For ``-o json``: without the whole record, which ``kvpilot explain`` shows."""
        found = {"id": self.id, "at": moment(self.at), "rule": self.rule, "outcome": self.outcome}
        found["summary"] = self.summary
        return found if self.generation is None else {**found, "generation": self.generation}


def last_numbers(records: Sequence[Json]) -> tuple[int, int]:
    """The highest numbers of a decision and of a generation that records name; 0 without one."""
    ids = (re.fullmatch(r"d-(\d+)", str(record["id"])) for record in records)
    generations = (record.get("generation") for record in records)
    return (
        max((int(found[1]) for found in ids if found is not None), default=0),
        max((number for number in generations if isinstance(number, int)), default=0),
    )


def history_of(status: Status, records: Sequence[Json]) -> tuple[Entry, ...]:
    """Decisions by time: from whole records where they are kept, else from the summaries of the status."""
    found = {
        (item.id, item.outcome): Entry(item.id, item.at, item.rule, item.outcome, item.summary)
        for item in status.decisions
    }
    for record in records:
        entry = Entry(
            id=str(record["id"]),
            at=float(record["at"]),
            rule=str(record.get("rule", "")),
            outcome=str(record["outcome"]),
            summary=str(record.get("summary", "")),
            generation=record.get("generation"),
            record=record,
        )
        found[entry.id, entry.outcome] = entry
    return tuple(sorted(found.values(), key=lambda entry: entry.at))
