"""``kvpilot record``: what a deployment was offered, from Prometheus, for a backtest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command(
        help="Read from Prometheus how many requests a deployment got, and how long they were, and write a "
        "recording that `kvpilot backtest --trace` replays.",
        epilog="Examples: `kvpilot record chat -n team-a --url http://prometheus:9090 --out chat.jsonl`; "
        "`kvpilot record chat --url http://prometheus:9090 --since 2026-01-05T08:00:00Z "
        "--until 2026-01-05T20:00:00Z --out monday.jsonl`. "
        "Exit code: 0 with a recording, also where Prometheus did not answer for a part of the time, which "
        "is then a gap; 1 if it never answers, or the file cannot be written; 2 for invalid input, and if it "
        "has no data of the deployment.",
    )
    def record(
        name: Annotated[str, typer.Argument(help="The KVCacheDeployment.")],
        url: Annotated[str, typer.Option(help="Prometheus, e.g. http://prometheus:9090")],
        out: Annotated[Path, typer.Option(help="File for the recording.")],
        namespace: Annotated[str, typer.Option("--namespace", "-n", help="Its namespace.")] = "default",
        since: Annotated[
            str, typer.Option(help="Begin: a duration before now (24h) or an RFC 3339 time.")
        ] = "24h",
        until: Annotated[str, typer.Option(help="End, in the same form.")] = "0s",
        step: Annotated[float, typer.Option(help="Seconds of an interval; four scrapes or more.")] = 60.0,
        token_file: Annotated[str, typer.Option(help="File with a bearer token.")] = "",
        ca_file: Annotated[str, typer.Option(help="Certificate authorities.")] = "",
    ) -> None:
        from kvpilot_operator.backtest.record import RecordOptions, run_record

        raise typer.Exit(
            run_record(
                RecordOptions(
                    name=name,
                    namespace=namespace,
                    url=url,
                    out=out,
                    since=since,
                    until=until,
                    step=step,
                    token_file=token_file,
                    ca_file=ca_file,
                )
            )
        )
