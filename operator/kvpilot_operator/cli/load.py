"""``kvpilot load``: traffic against any OpenAI-compatible server, with figures at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpilot_operator.cli.given import given


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command(help="Send chat sessions or a recorded trace to URL, open loop, and report what came of it.")
    def load(
        context: typer.Context,
        url: Annotated[str, typer.Argument(help="Server, e.g. http://127.0.0.1:8000")],
        rate: Annotated[float, typer.Option(help="Chat requests/s (Poisson).")] = 4.0,
        duration: Annotated[
            float | None, typer.Option(help="Seconds to send. Default: 60, or the whole trace.")
        ] = None,
        seed: Annotated[int, typer.Option(help="Same seed, same load.")] = 1,
        turns: Annotated[int, typer.Option(help="Turns of a chat.")] = 4,
        system_prompts: Annotated[int, typer.Option(help="Different system prompts, each shared.")] = 4,
        system_tokens: Annotated[int, typer.Option(help="Tokens of a system prompt.")] = 256,
        user_tokens: Annotated[int, typer.Option(help="Tokens of a user's turn, on average.")] = 64,
        output_tokens: Annotated[int, typer.Option(help="Tokens of an answer, on average.")] = 32,
        think: Annotated[float, typer.Option(help="Least seconds between turns of one chat.")] = 3.0,
        trace: Annotated[
            Path | None, typer.Option(help="Replay a Mooncake (JSON lines) or Azure (CSV) trace instead.")
        ] = None,
        speed: Annotated[float, typer.Option(help="Replay the trace this many times as fast.")] = 1.0,
        shrink: Annotated[int, typer.Option(help="Divide the trace's lengths; 32: block to page.")] = 1,
        stream: Annotated[
            bool, typer.Option("--stream", help="Stream, and measure the first token.")
        ] = False,
        timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up.")] = 120.0,
        json_out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
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
                    given=given(context),
                )
            )
        )
