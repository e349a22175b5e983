"""``kvpilot up``: a deployment on this machine, tuned as it would be in a cluster."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvpilot_operator.cli.given import given


class _Load(StrEnum):
    CHAT = "chat"
    TRACE = "trace"


class _Mode(StrEnum):
    OFF = "Off"
    RECOMMEND = "Recommend"
    AUTO = "Auto"


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command(help="Run MANIFEST on this machine: engines, one port in front, and the tuner.")
    def up(
        context: typer.Context,
        manifest: Annotated[Path, typer.Argument(help="A KVCacheDeployment in YAML; edits apply hot.")],
        load: Annotated[_Load | None, typer.Option(help="Send traffic, and end with it.")] = None,
        trace: Annotated[
            Path | None, typer.Option(help="Send a Mooncake (JSON lines) or Azure (CSV) trace.")
        ] = None,
        speed: Annotated[float, typer.Option(help="Replay the trace this many times as fast.")] = 1.0,
        shrink: Annotated[int, typer.Option(help="Divide the trace's lengths; 32: block to page.")] = 1,
        rate: Annotated[
            float | None, typer.Option(help="Constant rate of the chats/s; without: calm, then a rise.")
        ] = None,
        duration: Annotated[float | None, typer.Option(help="End after so many seconds of load.")] = None,
        mode: Annotated[_Mode | None, typer.Option(help="Over the manifest's tuning mode.")] = None,
        check: Annotated[
            bool,
            typer.Option(
                "--check", help="Exit 0 only if a breach happened and a knob cured it; starts afresh."
            ),
        ] = False,
        report: Annotated[Path | None, typer.Option(help="Where the HTML report goes.")] = None,
        json_out: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
        port: Annotated[
            int, typer.Option(min=0, max=65535, help="Port in front of the replicas; 0: a free one.")
        ] = 0,
        fresh: Annotated[bool, typer.Option("--fresh", help="Forget what earlier runs learned.")] = False,
        pace_scale: Annotated[
            float, typer.Option(min=0.05, max=100, help="Factor on the tuner's durations.", hidden=True)
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
            check=check,
            report=report,
            json_out=json_out,
            port=port,
            fresh=fresh,
            pace_scale=pace_scale,
            given=given(context),
        )
        raise typer.Exit(run_up(options))
