"""``kvpilot operator``: the operator in a cluster."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("operator")(run)


def run(
    sources_file: Annotated[
        Path, typer.Option(envvar="KVPILOT_SOURCES_FILE", help="Metrics sources, YAML.")
    ] = Path("/etc/kvpilot/sources.yaml"),
    operator_key_file: Annotated[
        Path,
        typer.Option(envvar="KVPILOT_OPERATOR_KEY_FILE", help="Key that admin tokens are derived from."),
    ] = Path("/etc/kvpilot-operator/key"),
    alerts_token_file: Annotated[
        Path | None,
        typer.Option(envvar="KVPILOT_ALERTS_TOKEN_FILE", help="Bearer token of /alerts; closed without it."),
    ] = None,
    namespaces: Annotated[
        str,
        typer.Option(
            envvar="KVPILOT_NAMESPACES", help="Watched namespaces, comma-separated; all when empty."
        ),
    ] = "",
    pace_scale: Annotated[
        float,
        typer.Option(envvar="KVPILOT_PACE_SCALE", min=0.01, max=10, help="Factor on every duration."),
    ] = 1.0,
    metrics_port: Annotated[
        int, typer.Option(envvar="KVPILOT_METRICS_PORT", min=1, max=65535, help="/metrics and /healthz.")
    ] = 8080,
    alerts_port: Annotated[
        int, typer.Option(envvar="KVPILOT_ALERTS_PORT", min=1, max=65535, help="/alerts.")
    ] = 8081,
    kubeconfig: Annotated[
        Path | None,
        typer.Option(help="Outside of a cluster: how to reach it.", exists=True, dir_okay=False),
    ] = None,
    log_level: Annotated[str, typer.Option(envvar="KVPILOT_LOG_LEVEL", help="DEBUG to ERROR.")] = "INFO",
) -> None:
    """Run the operator: watch KVCacheDeployments, keep them inside their objectives. Stops on SIGTERM."""
    from kvpilot_operator import logs
    from kvpilot_operator.service import Options, operate

    logs.configure(log_level.upper())
    if kubeconfig is not None:
        # Kopf logs in by the environment.
        os.environ["KUBECONFIG"] = str(kubeconfig)
    options = Options(
        sources_file=sources_file,
        key_file=operator_key_file,
        kubeconfig=kubeconfig,
        alerts_token_file=alerts_token_file,
        namespaces=tuple(filter(None, (name.strip() for name in namespaces.split(",")))),
        pace_scale=pace_scale,
        metrics_port=metrics_port,
        alerts_port=alerts_port,
    )
    try:
        asyncio.run(operate(options))
    except (OSError, ValueError) as error:
        typer.echo(f"kvpilot operator: {error}", err=True)
        raise typer.Exit(2) from error
