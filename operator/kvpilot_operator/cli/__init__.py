"""The ``kvpilot`` command. One module per subcommand; each imports what it needs only when it runs."""

from __future__ import annotations

import typer

from kvpilot_operator.cli import explain, load, operate, serve, up

app = typer.Typer(
    name="kvpilot",
    help="Keep KV-cache serving inside its objectives: locally, or as a Kubernetes operator.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (up, load, explain, operate, serve):
    command.register(app)

__all__ = ["app"]
