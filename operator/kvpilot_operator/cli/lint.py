"""``kvpilot lint``: what a valid manifest asks for and can never get."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpilot_operator.cli.output import Format, emit


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command(
        help="Check a manifest: rules that can never fire or undo each other for ever, objectives out of "
        "reach, windows that never open.",
        epilog="Exit code: 1 with an error, 0 without one, 2 for a manifest that the operator would refuse. "
        "Example: `kvpilot lint chat.yaml -o json`",
    )
    def lint(
        manifest: Annotated[Path, typer.Argument(help="File with one KVCacheDeployment.")],
        output: Annotated[Format, typer.Option("--output", "-o", help="Output format.")] = Format.TEXT,
    ) -> None:
        import time

        from kvpilot_operator.resource.errors import ManifestError
        from kvpilot_operator.resource.lint import lint as findings_of
        from kvpilot_operator.resource.load import load_manifest

        try:
            found = findings_of(load_manifest(manifest).spec, time.time())
        except ManifestError as error:
            source = "" if error.source else f"{manifest}: "
            for line in str(error).splitlines():
                typer.echo(f"kvpilot lint: {source}{line}", err=True)
            raise typer.Exit(2) from error
        nothing = f"{manifest}: nothing found"
        emit(output, [item.as_json() for item in found], lambda: [item.line for item in found] or [nothing])
        if any(item.severity == "error" for item in found):
            raise typer.Exit(1)
