"""``kvpilot serve``: run one engine without an operator."""

from __future__ import annotations

import os
import sys

import typer


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
        help="Run one engine with an OpenAI-compatible API.",
        epilog="Examples: `kvpilot serve --port 8000`; `kvpilot serve --help`",
    )
    def serve(context: typer.Context) -> None:
        # A new process image, because kvpilot_operator never imports torch.
        os.environ["KVPILOT_PROGRAM"] = "kvpilot serve"
        os.execv(sys.executable, [sys.executable, "-m", "kvpilot_engine", *context.args])
