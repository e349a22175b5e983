"""``kvpilot status`` and ``kvpilot history``: what is, and what was done."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpilot_operator.cli.arguments import ANYWHERE, MaybeName, Name, Output, Where
from kvpilot_operator.cli.groups import grouped
from kvpilot_operator.cli.output import Format, coloured, emit, table
from kvpilot_operator.cli.target import CommandError, Target, find, find_all, reporting

if TYPE_CHECKING:
    from kvpilot_operator.status.history import Entry
    from kvpilot_operator.status.model import GenerationStatus, Status
    from kvpilot_operator.status.overview import Overview


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""

    @app.command(
        help="Show the state of each KVCacheDeployment: objectives, replicas, the change in flight, holds.",
        epilog="Examples: `kvpilot status`; `kvpilot status chat -n team-a`; `kvpilot status -A -o json`",
    )
    @grouped
    def status(
        name: MaybeName = "",
        where: Where = ANYWHERE,
        everywhere: Annotated[
            bool, typer.Option("--all-namespaces", "-A", help="All namespaces of the cluster.")
        ] = False,
        output: Output = Format.TEXT,
    ) -> None:
        with reporting("status"):
            if name:
                one = overview(find(name, where))
                emit(output, one.as_json(), lambda: list(one.lines()))
                return
            found = [overview(target) for target in find_all(where, everywhere=everywhere)]
            emit(output, [item.as_json() for item in found], lambda: rows_of(found))

    @app.command(
        help="List the decisions and the generations of the configuration that they made, oldest first.",
        epilog="Examples: `kvpilot history chat`; `kvpilot history chat --last 5 -o yaml`",
    )
    @grouped
    def history(
        name: Name,
        where: Where = ANYWHERE,
        last: Annotated[int, typer.Option(min=1, help="Number of decisions.")] = 20,
        output: Output = Format.TEXT,
    ) -> None:
        from kvpilot_operator.status.history import history_of

        with reporting("history"):
            target = find(name, where)
            status = status_of(target)
            entries = history_of(status, target.records())[-last:]
            kept = status.tuning.generations if status.tuning else ()
            document = {
                "decisions": [entry.as_json() for entry in entries],
                "generations": [item.model_dump(by_alias=True, mode="json") for item in kept],
            }
            emit(output, document, lambda: [history_rows(entries), *generation_rows(kept)])


def status_of(target: Target) -> Status:
    """The typed status of a resource.

    Raises:
        CommandError: it cannot be read.
    """
    from pydantic import ValidationError

    from kvpilot_engine.contract import config_errors
    from kvpilot_operator.status.model import Status

    try:
        return Status.model_validate(target.manifest.get("status") or {})
    except ValidationError as error:
        reported = "; ".join(config_errors(error))
        raise CommandError(f"the status of {target.key.name} cannot be read: {reported}") from None


def overview(target: Target) -> Overview:
    """The present state of a resource.

    Raises:
        CommandError: its status cannot be read.
    """
    from kvpilot_operator.status.overview import overview_of

    status_of(target)
    return overview_of(target.manifest, target.overrides(), time.time(), ended=target.ended)


def rows_of(found: list[Overview]) -> Any:
    """The table of ``kvpilot status``."""
    if not found:
        return "no KVCacheDeployment"
    headings = ("NAMESPACE", "NAME", "MODE", "STATE", "READY", "GEN", "OBJECTIVES", "CHANGE / HOLDS")
    several = len({item.namespace for item in found}) > 1
    rows = table(headings[not several :], (_row(item)[not several :] for item in found), wrapping=2)
    off = dict.fromkeys(item.off.text for item in found if item.off)
    return [rows, *(f"Tuning is {text}." for text in off)]


def _row(item: Overview) -> tuple[Any, ...]:
    worst = next((s for s in ("Breached", "Infeasible", "Met") if item.having(s)), "")
    paused = [one.kind for one in item.overrides if one.in_force]
    notes = [
        "tuning off" if item.off else "",
        item.change,
        *(f"{one.split()[0]} pending" for one in item.pending),
        *item.other_holds,
        *(f"override {kind}" for kind in dict.fromkeys(paused)),
    ]
    return (
        item.namespace,
        item.name,
        item.mode,
        coloured(item.state, "ended" if item.ended else item.state),
        f"{item.ready}/{item.replicas}",
        "-" if item.generation is None else str(item.generation),
        coloured(worst, item.objectives_text),
        ", ".join(filter(None, notes)) or "-",
    )


def history_rows(entries: tuple[Entry, ...]) -> Any:
    """The table of ``kvpilot history``."""
    from kvpilot_operator.resource.times import moment

    if not entries:
        return "No decision so far."
    headings = ("TIME", "ID", "RULE", "OUTCOME", "GEN", "SUMMARY")
    return table(
        headings,
        (
            (
                moment(entry.at),
                entry.id,
                entry.rule or "-",
                coloured(entry.outcome),
                "-" if entry.generation is None else str(entry.generation),
                entry.summary,
            )
            for entry in entries
        ),
    )


def generation_rows(kept: tuple[GenerationStatus, ...]) -> list[Any]:
    """The table of the generations that are kept, with its heading; nothing if none is."""
    from kvpilot_operator.resource.times import moment

    if not kept:
        return []
    rows = (
        (
            str(item.number),
            moment(item.at),
            item.decision or "-",
            coloured(item.verdict) if item.verdict else "-",
            item.knobs,
        )
        for item in kept
    )
    headings = ("GEN", "SINCE", "DECISION", "VERDICT", "TUNED KNOBS")
    return ["", "Configurations that `kvpilot rollback` can go back to:", table(headings, rows)]
