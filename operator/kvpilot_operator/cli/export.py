"""``kvpilot export``: the resource as a manifest for Git, with what was tuned written into it."""

from __future__ import annotations

from typing import Annotated

import typer

from kvpilot_operator.cli.arguments import ANYWHERE, Name, Output, Where
from kvpilot_operator.cli.groups import grouped
from kvpilot_operator.cli.output import Format, emit
from kvpilot_operator.cli.status import status_of
from kvpilot_operator.cli.target import find, reporting


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(
        epilog="Examples: `kvpilot export --as-spec chat > chat.yaml`; `kvpilot export chat -o json`"
    )(grouped(export))


def export(
    name: Name,
    _as_spec: Annotated[
        bool, typer.Option("--as-spec", help="As a KVCacheDeployment; there is no other form yet.")
    ] = True,
    where: Where = ANYWHERE,
    output: Output = Format.TEXT,
) -> None:
    """Print the manifest with the tuned values in spec.engine.config; comments name their decisions."""
    from kvpilot_operator.status.export import as_spec
    from kvpilot_operator.status.history import history_of

    with reporting("export"):
        target = find(name, where)
        status = status_of(target)
        exported = as_spec(target.manifest, status, history_of(status, target.records()))
        emit(output, exported.manifest, lambda: exported.text().rstrip("\n").splitlines())
