"""Commands that write KVCacheOverrides and end them: pause, approve, pin, boost, rollback."""

from __future__ import annotations

from typing import Annotated

import typer

from kvpilot_engine.contract.wording import counted
from kvpilot_operator.cli.arguments import (
    ANYWHERE,
    KnobName,
    Name,
    Output,
    Terms,
    Where,
    complete_decisions,
    complete_generations,
)
from kvpilot_operator.cli.groups import grouped
from kvpilot_operator.cli.output import Format
from kvpilot_operator.cli.target import CommandError, Target, find, reporting

ALERTS = "alertmanager"
"""Who asks for the boosts of alerts."""

HALF_AN_HOUR, AN_HOUR, TWO_HOURS = Terms("30m"), Terms("1h"), Terms("2h")

EXAMPLES = {
    "pause": "`kvpilot pause chat --for 2h --reason 'incident 4711'`; `kvpilot pause chat --scaling`",
    "resume": "`kvpilot resume chat -n team-a`",
    "approve": "`kvpilot approve chat d-0042`",
    "pin": "`kvpilot pin chat numWorkers 16 --for 2h`; `kvpilot pin chat cacheStrategy lfu`",
    "unpin": "`kvpilot unpin chat numWorkers`",
    "boost": "`kvpilot boost chat 6 --for 30m --reason 'launch at noon'`",
    "unboost": "`kvpilot unboost chat`",
    "rollback": "`kvpilot rollback chat`; `kvpilot rollback chat --to 5 --reason 'answers got slow'`",
}


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    for command in (pause, resume, approve, pin, unpin, boost, unboost, rollback):
        app.command(epilog=f"Examples: {EXAMPLES[command.__name__]}")(grouped(command))


def pause(
    name: Name,
    terms: Terms = AN_HOUR,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Stop everything that sets the number of replicas as well.")
    ] = False,
    where: Where = ANYWHERE,
    output: Output = Format.TEXT,
) -> None:
    """Stop tuning for a while. Bounds, boosts and alerts go on, unless --scaling stops them too."""
    from kvpilot_operator.cli.asking import Asked, ask

    said = "tuning and scaling are paused" if scaling else "tuning is paused; bounds and boosts go on"
    asked = Asked({"pause": {"scaling": scaling}}, said, f"resume {name}")
    with reporting("pause"):
        ask(find(name, where), asked, terms, output)


def resume(name: Name, where: Where = ANYWHERE, output: Output = Format.TEXT) -> None:
    """End every pause of a KVCacheDeployment."""
    from kvpilot_operator.cli.asking import end

    with reporting("resume"):
        end(find(name, where), "pause", lambda _: True, "is not paused", output)


def approve(
    name: Name,
    decision: Annotated[
        str,
        typer.Argument(
            help="ID of the decision, as `kvpilot status` shows it.", autocompletion=complete_decisions
        ),
    ],
    terms: Terms = AN_HOUR,
    where: Where = ANYWHERE,
    output: Output = Format.TEXT,
) -> None:
    """Let kvpilot make the change of a pending decision, in mode Approve."""
    from kvpilot_operator.cli.asking import Asked, ask

    asked = Asked({"approve": {"decision": decision}}, f"{decision} is approved")
    with reporting("approve"):
        ask(find(name, where), asked, terms, output)


def pin(
    name: Name,
    knob: KnobName,
    value: Annotated[str, typer.Argument(help="The value, as in spec.engine.config.")],
    terms: Terms = TWO_HOURS,
    where: Where = ANYWHERE,
    output: Output = Format.TEXT,
) -> None:
    """Keep a knob at a value for a while; no rule changes it meanwhile."""
    from kvpilot_operator.cli.asking import Asked, ask
    from kvpilot_operator.status.model import value_of

    what = {"pin": {"knob": knob, "value": value_of(value)}}
    asked = Asked(what, f"{knob} is pinned to {value}", f"unpin {name} {knob}")
    with reporting("pin"):
        ask(find(name, where), asked, terms, output)


def unpin(name: Name, knob: KnobName, where: Where = ANYWHERE, output: Output = Format.TEXT) -> None:
    """End every pin of a knob."""
    from kvpilot_operator.cli.asking import end

    with reporting("unpin"):
        target = find(name, where)
        end(target, "pin", lambda spec: spec["pin"]["knob"] == knob, f"has no pin of {knob}", output)


def boost(
    name: Name,
    minimum: Annotated[int, typer.Argument(metavar="MIN", help="Least number of replicas.")],
    terms: Terms = HALF_AN_HOUR,
    where: Where = ANYWHERE,
    output: Output = Format.TEXT,
) -> None:
    """Ask for at least MIN replicas for a while, within spec.scaling.max."""
    from kvpilot_operator.cli.asking import Asked, ask

    said = f"at least {counted(minimum, 'replica', 'is', 'are')} asked for"
    asked = Asked({"boost": {"minReplicas": minimum}}, said, f"unboost {name}")
    with reporting("boost"):
        ask(find(name, where), asked, terms, output)


def unboost(name: Name, where: Where = ANYWHERE, output: Output = Format.TEXT) -> None:
    """End every boost that a person asked for; those of alerts stay."""
    from kvpilot_operator.cli.asking import end

    with reporting("unboost"):
        target = find(name, where)
        end(target, "boost", lambda spec: spec.get("by") != ALERTS, "has no boost of a person", output)


def rollback(
    name: Name,
    to: Annotated[
        int | None,
        typer.Option(
            help="Generation, as `kvpilot history` lists them.", autocompletion=complete_generations
        ),
    ] = None,
    terms: Terms = AN_HOUR,
    where: Where = ANYWHERE,
    output: Output = Format.TEXT,
) -> None:
    """Go back to the configuration of an earlier generation; without --to, to the last that differs."""
    from kvpilot_operator.cli.asking import Asked, ask

    with reporting("rollback"):
        target = find(name, where)
        generation = _generation_before(target) if to is None else to
        asked = Asked({"rollback": {"to": generation}}, f"it goes back to generation {generation}")
        ask(target, asked, terms, output)


def _generation_before(target: Target) -> int:
    """The kept generation to go back to without ``--to``.

    Raises:
        CommandError: there is none, or the resource is invalid.
    """
    from kvpilot_operator.cli.status import status_of
    from kvpilot_operator.resource.errors import ManifestError
    from kvpilot_operator.resource.model import KVCacheDeployment
    from kvpilot_operator.resource.resolve import base_config, policy_of
    from kvpilot_operator.status.codec import state_of
    from kvpilot_operator.tuning.permission.generations import generation_before

    status = status_of(target)
    present = status.config.generation if status.config else None
    try:
        spec = KVCacheDeployment.parse(target.manifest).spec
        bounds = policy_of(spec).bounds
    except ManifestError as error:
        raise CommandError(f"{error}; --to says where to go back to") from None
    base = base_config(spec).model_dump(by_alias=True, exclude_unset=True, mode="json")
    found = None if present is None else generation_before(state_of(status), present, base, bounds)
    if found is None:
        raise CommandError(
            f"no kept generation before the present one ({present}) has other tuned knobs and was not "
            "taken back"
        )
    return found
