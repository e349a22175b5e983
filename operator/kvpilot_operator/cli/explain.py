"""``kvpilot explain``: the last decisions and the present holds, of a cluster or of a local run."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from kvpilot_operator.cli.arguments import ANYWHERE, Name, Output, Where, complete_knobs
from kvpilot_operator.cli.groups import grouped
from kvpilot_operator.cli.output import Format, emit
from kvpilot_operator.cli.target import CommandError, Target, find, reporting
from kvpilot_operator.options import given_options


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command(
        help="Explain the last changes of a KVCacheDeployment and why no change is made now.",
        epilog="Examples: `kvpilot explain quickstart`; `kvpilot explain chat -n team-a -o json`; "
        "`kvpilot explain chat --why-not batchSize`",
    )
    @grouped
    def explain(
        ctx: typer.Context,
        name: Name,
        where: Where = ANYWHERE,
        last: Annotated[int, typer.Option(min=0, help="Number of changes.")] = 5,
        knob: Annotated[
            str | None,
            typer.Option(
                "--why-not",
                metavar="KNOB",
                help="Say why this knob is not changed now, instead.",
                autocompletion=complete_knobs,
            ),
        ] = None,
        output: Output = Format.TEXT,
    ) -> None:
        from kvpilot_operator.cli.status import status_of
        from kvpilot_operator.status.explain import explain as explained

        with reporting("explain"):
            target = find(name, where)
            if knob is not None:
                if "last" in given_options(ctx):
                    raise CommandError("--last: cannot go with --why-not, which lists no changes")
                lines = _why_not(target, knob)
                emit(output, {"name": name, "knob": knob, "whyNot": lines}, lambda: lines)
                return
            status_of(target)
            explanation = explained(target.manifest, target.records(), last, time.time(), ended=target.ended)
            emit(output, explanation.as_json(), explanation.lines)


def _why_not(target: Target, knob: str) -> list[str]:
    from kvpilot_operator.cli.status import status_of
    from kvpilot_operator.status.history import history_of
    from kvpilot_operator.status.overrides import overrides_of
    from kvpilot_operator.status.why_not import known_of, why_not

    status, now = status_of(target), time.time()
    asked = overrides_of(target.overrides(), target.key.name, target.manifest, now)
    known = known_of(target.manifest, status, history_of(status, target.records()), asked, now)
    try:
        return why_not(known, knob)
    except ValueError as error:
        raise CommandError(f"--why-not: {error}") from None
