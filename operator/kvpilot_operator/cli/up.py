"""``kvpilot up``: run and tune a deployment on this machine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvpilot_operator.cli.arguments import Switch
from kvpilot_operator.options import given_options


class _Load(StrEnum):
    CHAT = "chat"
    TRACE = "trace"


class _Mode(StrEnum):
    OFF = "Off"
    RECOMMEND = "Recommend"
    AUTO = "Auto"


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command(
        help="Run a KVCacheDeployment on this machine: its engines, one port in front, and the tuner.",
        epilog="Examples: `kvpilot up examples/quickstart.yaml --port 8000`; "
        "`kvpilot up examples/quickstart.yaml --load chat --check`",
    )
    def up(
        context: typer.Context,
        manifest: Annotated[
            Path,
            typer.Argument(help="A KVCacheDeployment in YAML; edits of the file are applied while it runs."),
        ],
        load: Annotated[_Load | None, typer.Option(help="Send this load, and stop when it ends.")] = None,
        trace: Annotated[
            Path | None,
            typer.Option(help="Send a Mooncake (JSON lines) or Azure (CSV) trace, and stop when it ends."),
        ] = None,
        speed: Annotated[float, typer.Option(help="Factor on the speed of the trace.")] = 1.0,
        shrink: Annotated[
            int, typer.Option(help="Divisor of the trace's lengths; 32 makes a block one page.")
        ] = 1,
        rate: Annotated[
            float | None,
            typer.Option(help="Constant chat requests/s. Default: a calm phase, then a rise to saturation."),
        ] = None,
        duration: Annotated[float | None, typer.Option(help="Stop after this many seconds of load.")] = None,
        mode: Annotated[_Mode | None, typer.Option(help="Tuning mode instead of the manifest's.")] = None,
        tuning: Annotated[
            Switch,
            typer.Option(help="off makes no change, whatever the mode; bounds, boosts and pins go on."),
        ] = Switch.ON,
        check: Annotated[
            bool,
            typer.Option(
                "--check",
                help="Exit with 0 only if a knob cured a breach of a latency objective; implies --fresh.",
            ),
        ] = False,
        report: Annotated[Path | None, typer.Option(help="File for the HTML report.")] = None,
        json_out: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
        port: Annotated[
            int, typer.Option(min=0, max=65535, help="Port in front of the replicas; 0 takes a free one.")
        ] = 0,
        fresh: Annotated[bool, typer.Option("--fresh", help="Delete the state of earlier runs.")] = False,
        pace_scale: Annotated[
            float, typer.Option(min=0.05, max=100, help="Factor on all durations of the tuner.", hidden=True)
        ] = 1.0,
    ) -> None:
        from kvpilot_operator.local.command import UpOptions, run_up

        options = UpOptions(
            manifest=manifest,
            load=None if load is None else load.value,
            trace=trace,
            speed=speed,
            shrink=shrink,
            rate=rate,
            duration=duration,
            mode=None if mode is None else mode.value,
            tuning=tuning is Switch.ON,
            check=check,
            report=report,
            json_out=json_out,
            port=port,
            fresh=fresh,
            pace_scale=pace_scale,
            given=given_options(context),
        )
        raise typer.Exit(run_up(options))
