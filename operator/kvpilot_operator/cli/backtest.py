"""``kvpilot backtest``: what the tuner would do, on simulated engines and a virtual clock."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvpilot_operator.options import given_options


class _Pace(StrEnum):
    FAST = "Fast"
    STANDARD = "Standard"


class _Device(StrEnum):
    RECORDED = "recorded"
    FITTING = "fitting"


EXAMPLES = """Examples:

`kvpilot backtest --trace conversation.jsonl --against hpa,keda --seeds 30 --json out.json --report out.html`

`kvpilot backtest chat.yaml --load step,spike --against do-nothing,hpa,always-max --tune`

`kvpilot backtest chat.yaml --load step --faults slow@0+7200,outage@1800+300`

`kvpilot backtest chat.yaml --aa 100 --replicas 3 --sticky --json aa.json`

`kvpilot backtest chat.yaml --regression 1.5 100 --pace Fast`
"""


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command(
        help="Play the tuner on simulated engines: under a recorded or synthetic load against other "
        "controllers, or with planted changes.",
        epilog=EXAMPLES,
    )
    def backtest(
        context: typer.Context,
        manifest: Annotated[Path, typer.Argument(help="A KVCacheDeployment in YAML.")] = Path(
            "examples/production.yaml"
        ),
        trace: Annotated[
            Path | None,
            typer.Option(
                help="Play a Mooncake (JSON lines) or Azure (CSV) trace, or a recording of `kvpilot record`."
            ),
        ] = None,
        load: Annotated[
            str | None,
            typer.Option(help="Play synthetic loads, one after another: step, ramp, spike, diurnal, sine."),
        ] = None,
        aa: Annotated[
            int | None,
            typer.Option("--aa", metavar="RUNS", help="Plant a change of a knob that has no effect at all."),
        ] = None,
        regression: Annotated[
            tuple[float, int] | None,
            typer.Option(metavar="FACTOR RUNS", help="Plant a change that makes steps slower by FACTOR."),
        ] = None,
        gain: Annotated[
            tuple[float, int] | None,
            typer.Option(metavar="FACTOR RUNS", help="Plant a change that makes steps faster by FACTOR."),
        ] = None,
        device: Annotated[
            _Device | None,
            typer.Option(
                help="Simulate the engines that a recording of `kvpilot record` shows, or such as fit the "
                "objectives. Default: recorded where the recording tells them."
            ),
        ] = None,
        against: Annotated[
            str,
            typer.Option(
                help="Controllers to compare with: static-mean, static-peak, hpa, keda, vpa, dynamo, "
                "random-search, oracle, do-nothing, always-max."
            ),
        ] = "do-nothing,hpa,keda,always-max",
        faults: Annotated[
            str,
            typer.Option(
                help="NAME[@START[+SECONDS]],... with slow, hung, silent, stale or restart (one replica), "
                "outage or gap (of the metrics)."
            ),
        ] = "",
        seeds: Annotated[int, typer.Option(help="Runs of each controller.")] = 5,
        seed: Annotated[int, typer.Option(help="Seed of the first run; the next ones count up.")] = 1,
        start_seconds: Annotated[float, typer.Option(help="Mean start-up time of a replica.")] = 60.0,
        scale: Annotated[
            float | None,
            typer.Option(help="Requests for each recorded one. Default: the busiest minute needs scaling."),
        ] = None,
        duration: Annotated[float | None, typer.Option(help="Stop the load after this many seconds.")] = None,
        tune: Annotated[
            bool,
            typer.Option(
                "--tune", help="Choose the parameters of the others on the synthetic loads, with other seeds."
            ),
        ] = False,
        replicas: Annotated[
            int | None, typer.Option(help="Replicas of a planted run. Default: the manifest's least number.")
        ] = None,
        sticky: Annotated[
            bool, typer.Option("--sticky", help="Send the requests of a session to one replica.")
        ] = False,
        pace: Annotated[_Pace | None, typer.Option(help="Pace instead of the manifest's.")] = None,
        json_out: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
        report: Annotated[Path | None, typer.Option(help="File for the HTML report.")] = None,
        verbose: Annotated[
            bool, typer.Option("--verbose", help="Print the decisions of every planted run.")
        ] = False,
    ) -> None:
        from kvpilot_operator.backtest.command import BacktestOptions, run_backtest

        options = BacktestOptions(
            manifest=manifest,
            trace=trace,
            load=load,
            aa=aa,
            regression=regression,
            gain=gain,
            device=None if device is None else device.value,
            against=against,
            faults=faults,
            seeds=seeds,
            seed=seed,
            start_seconds=start_seconds,
            scale=scale,
            duration=duration,
            tune=tune,
            replicas=replicas,
            sticky=sticky,
            pace=None if pace is None else pace.value,
            json_out=json_out,
            report=report,
            verbose=verbose,
            given=given_options(context),
        )
        raise typer.Exit(run_backtest(options))
