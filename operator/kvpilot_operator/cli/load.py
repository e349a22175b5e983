"""``kvpilot load``: send traffic to an OpenAI-compatible server and report the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpilot_operator.options import given_options


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command(
        help="Send chats or a recorded trace to URL on schedule; report latency, hit rate and errors.",
        epilog="Example: `kvpilot load http://127.0.0.1:8000 --rate 20 --duration 60`",
    )
    def load(
        context: typer.Context,
        url: Annotated[str, typer.Argument(help="OpenAI-compatible server, e.g. http://127.0.0.1:8000")],
        rate: Annotated[float, typer.Option(help="Chat requests/s, as a Poisson process.")] = 4.0,
        duration: Annotated[
            float | None, typer.Option(help="Seconds of load. Default: 60, or the whole trace.")
        ] = None,
        seed: Annotated[int, typer.Option(help="The same seed sends the same load.")] = 1,
        turns: Annotated[int, typer.Option(help="Turns per chat.")] = 4,
        system_prompts: Annotated[int, typer.Option(help="Number of system prompts that chats share.")] = 4,
        system_tokens: Annotated[int, typer.Option(help="Tokens per system prompt.")] = 256,
        user_tokens: Annotated[int, typer.Option(help="Mean tokens of a user's turn.")] = 64,
        output_tokens: Annotated[int, typer.Option(help="Mean tokens of an answer.")] = 32,
        think: Annotated[float, typer.Option(help="Minimum seconds between turns of one chat.")] = 3.0,
        trace: Annotated[
            Path | None,
            typer.Option(help="Replay a Mooncake (JSON lines) or Azure (CSV) trace instead of chats."),
        ] = None,
        speed: Annotated[float, typer.Option(help="Factor on the speed of the trace.")] = 1.0,
        shrink: Annotated[
            int, typer.Option(help="Divisor of the trace's lengths; 32 makes a block one page.")
        ] = 1,
        stream: Annotated[
            bool, typer.Option("--stream", help="Stream the answers and measure the first token.")
        ] = False,
        timeout: Annotated[float, typer.Option(help="Timeout of a request, s.")] = 120.0,
        json_out: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
    ) -> None:
        from kvpilot_operator.load.command import LoadOptions, run_load

        raise typer.Exit(
            run_load(
                LoadOptions(
                    url=url,
                    rate=rate,
                    duration=duration,
                    seed=seed,
                    turns=turns,
                    system_prompts=system_prompts,
                    system_tokens=system_tokens,
                    user_tokens=user_tokens,
                    output_tokens=output_tokens,
                    think=think,
                    trace=trace,
                    speed=speed,
                    shrink=shrink,
                    stream=stream,
                    timeout=timeout,
                    json_out=json_out,
                    given=given_options(context),
                )
            )
        )
