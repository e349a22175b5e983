"""Arguments and options that several commands share, and the completion of names."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpilot_operator.cli.output import Format

if TYPE_CHECKING:
    from kvpilot_operator.status.model import Status


class Switch(StrEnum):
    """Values of --tuning."""

    ON = "on"
    OFF = "off"


def _where(context: typer.Context) -> Where:
    """Where the command line so far looks."""
    given = context.params
    return Where(given.get("namespace") or "", given.get("context") or "", given.get("run"))


def complete_names(context: typer.Context, incomplete: str) -> list[str]:
    """Names of resources for the shell; nothing if none can be found quickly."""
    from kvpilot_operator.cli.target import CommandError, find_all

    try:
        found = find_all(_where(context))
    except CommandError:
        return []
    return [target.key.name for target in found if target.key.name.startswith(incomplete)]


def complete_contexts(incomplete: str) -> list[str]:
    """Contexts of the kubeconfig for the shell."""
    from kvpilot_operator.cli.in_cluster import context_names

    return [name for name in context_names() if name.startswith(incomplete)]


def _status(context: typer.Context) -> Status | None:
    """The status of the resource that the command line names so far; None if there is none."""
    from kvpilot_operator.cli.status import status_of
    from kvpilot_operator.cli.target import CommandError, find

    # Before an option without its value the name is among the words that are not read yet.
    name = context.params.get("name") or next(iter(context.args), "")
    try:
        return status_of(find(name, _where(context)))
    except CommandError:
        return None


def complete_decisions(context: typer.Context, incomplete: str) -> list[str]:
    """Decisions that wait for an approval, for the shell."""
    status = _status(context)
    waiting = status.tuning.pending if status and status.tuning else ()
    return [item.id for item in waiting if not item.approved_by and item.id.startswith(incomplete)]


def complete_generations(context: typer.Context, incomplete: str) -> list[str]:
    """Generations that are kept, for the shell."""
    status = _status(context)
    kept = [str(item.number) for item in (status.tuning.generations if status and status.tuning else ())]
    return [number for number in kept if number.startswith(incomplete)]


def complete_knobs(incomplete: str) -> list[str]:
    """Names of knobs for the shell."""
    from kvpilot_operator.tuning.configuration import KNOBS

    return [name for name in KNOBS if name.startswith(incomplete)]


Name = Annotated[str, typer.Argument(help="Name of the KVCacheDeployment.", autocompletion=complete_names)]
MaybeName = Annotated[
    str, typer.Argument(help="Name of a KVCacheDeployment; all without it.", autocompletion=complete_names)
]
KnobName = Annotated[
    str, typer.Argument(help="Name of the knob, e.g. numWorkers.", autocompletion=complete_knobs)
]
Output = Annotated[Format, typer.Option("--output", "-o", help="Output format.")]


@dataclass(frozen=True)
class Where:
    """Where a command finds a resource: a namespace in the cluster of a context, or a directory of runs."""

    namespace: Annotated[
        str,
        typer.Option(
            "--namespace", "-n", help="Namespace in the cluster; a local run of that name is then ignored."
        ),
    ] = ""
    context: Annotated[
        str,
        typer.Option(
            help="Context of the kubeconfig instead of the current one; local runs are then ignored.",
            autocompletion=complete_contexts,
        ),
    ] = ""
    run: Annotated[
        Path | None, typer.Option(help="Directory of local runs, or of this run; no cluster is asked.")
    ] = None


ANYWHERE = Where()
"""A local run of that name, else the present namespace of the current context."""


@dataclass(frozen=True)
class Terms:
    """How long something is asked for (``2h``), by whom (None: who runs the command), and why."""

    duration: Annotated[str, typer.Option("--for", help="How long, such as 90s, 30m or 1h30m.")]
    by: Annotated[
        str | None, typer.Option(help="Who asks. Default: the user of the cluster, or of this machine.")
    ] = None
    reason: Annotated[str, typer.Option(help="Why, for those who read it later.")] = ""

    @property
    def seconds(self) -> float:
        """The duration in s.

        Raises:
            CommandError: it is none, or 0.
        """
        from kvpilot_operator.cli.target import CommandError
        from kvpilot_operator.resource.times import duration_s

        try:
            seconds = duration_s(self.duration)
        except ValueError as error:
            raise CommandError(f"--for: {error}") from None
        if seconds <= 0:
            raise CommandError(f"--for: must be longer than 0 s, got {self.duration}")
        return seconds
