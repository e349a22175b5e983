"""``kvpilot top``: live figures of each replica."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from kvpilot_operator.cli.arguments import ANYWHERE, Name, Output, Where
from kvpilot_operator.cli.groups import grouped
from kvpilot_operator.cli.output import Format, console, emit
from kvpilot_operator.cli.target import CommandError, find, reporting

if TYPE_CHECKING:
    from kvpilot_operator.cli.figures import Watcher


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(epilog="Examples: `kvpilot top chat`; `kvpilot top chat --once -o json`")(grouped(top))


def top(
    name: Name,
    where: Where = ANYWHERE,
    once: Annotated[
        bool, typer.Option("--once", help="Print one table and end, as without a terminal.")
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.5, max=60, help="Seconds between two readings of the replicas.")
    ] = 2.0,
    output: Output = Format.TEXT,
) -> None:
    """Show live figures of each replica: rate, latency, queue, memory, hit rate, rows of a step."""
    from kvpilot_operator.cli.figures import Watcher

    with reporting("top"):
        target = find(name, where)
        if target.ended:
            raise CommandError(f"the run of {name} has ended; there are no replicas")
        watcher = Watcher(target)
        watcher.read()
        time.sleep(interval)
        watcher.read()
        if once or output is not Format.TEXT or not sys.stdout.isatty():
            emit(output, [item.as_json() for item in watcher.figures()], watcher.table)
            return
        _refresh(watcher, interval)


def _refresh(watcher: Watcher, interval: float) -> None:
    from rich.live import Live

    with Live(watcher.table(), console=console(), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval)
                watcher.read()
                live.update(watcher.table(), refresh=True)
        except KeyboardInterrupt:
            return
