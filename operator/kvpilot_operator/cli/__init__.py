"""The ``kvpilot`` command, one module for each subcommand; imports of the work are deferred until it runs."""

from __future__ import annotations

import re
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from kvpilot_operator.cli import (
    backtest,
    explain,
    export,
    lint,
    load,
    operate,
    override,
    record,
    serve,
    status,
    top,
    up,
)


class _Commands(TyperGroup):
    """Prints an invalid command line as one line, as the commands print their own errors."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line and exit with its code."""
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except typer.TyperException as error:
            code = error.exit_code
            given = args[0] if args else kwargs.get("args")
            words = sys.argv[1:] if given is None else given
            verb = next((word for word in words if word in self.commands), "")
            if line := _line_of(error, f"kvpilot {verb}".strip()):
                typer.echo(line, err=True)
        sys.exit(code)


def _line_of(error: typer.TyperException, command: str) -> str:
    """Command, option, what is allowed and the value; empty if the help was shown instead."""
    from pydantic import ValidationError

    message = error.format_message()
    if re.fullmatch(r"-[\d.]+", getattr(error, "option_name", "")):
        message += "; a negative value goes behind --"
    if isinstance(error, typer.BadParameter) and error.param is not None and error.message:
        name = getattr(error.param, "metavar", None) if error.param.param_type_name == "argument" else None
        message = f"{name or max(error.param.opts, key=len)}: {error.message.removeprefix('Value error, ')}"
        cause = error.__cause__
        # Typer's own checks name the value; those of pydantic's types do not.
        if isinstance(cause, ValidationError) and cause.errors()[0]["type"] != "value_error":
            message += f", got {cause.errors()[0]['input']}"
    message = " ".join(message.split()).removesuffix(".")
    return f"{command}: {message}" if message else ""


app = typer.Typer(
    name="kvpilot",
    cls=_Commands,
    help="Keep KV-cache serving within its objectives, on this machine or in Kubernetes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (up, load, lint, status, explain, top, override, export, backtest, record, operate, serve):
    command.register(app)

__all__ = ["app"]
