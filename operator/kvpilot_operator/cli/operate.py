"""``kvpilot operator``: run the operator of a Kubernetes cluster."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpilot_operator.cli.arguments import Switch

if TYPE_CHECKING:
    from kvpilot_operator.status.snapshot import Key


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(
        "operator",
        epilog="Example: `kvpilot operator --kubeconfig ~/.kube/config --sources-file sources.yaml "
        "--operator-key-file key`",
    )(run)


def run(
    sources_file: Annotated[
        Path, typer.Option(envvar="KVPILOT_SOURCES_FILE", help="YAML file with the metrics sources.")
    ] = Path("/etc/kvpilot/sources.yaml"),
    operator_key_file: Annotated[
        Path,
        typer.Option(
            envvar="KVPILOT_OPERATOR_KEY_FILE", help="File with the key that admin tokens are derived from."
        ),
    ] = Path("/etc/kvpilot-operator/key"),
    alerts_token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="KVPILOT_ALERTS_TOKEN_FILE",
            help="File with the bearer token of /alerts; without it /alerts is closed.",
        ),
    ] = None,
    namespaces: Annotated[
        str,
        typer.Option(
            envvar="KVPILOT_NAMESPACES", help="Watched namespaces, comma-separated; empty watches all."
        ),
    ] = "",
    pace_scale: Annotated[
        float,
        typer.Option(
            envvar="KVPILOT_PACE_SCALE", min=0.01, max=10, help="Factor on all durations of the tuner."
        ),
    ] = 1.0,
    tuning: Annotated[
        Switch,
        typer.Option(
            envvar="KVPILOT_TUNING",
            help="off makes no change and takes running candidates back; bounds and boosts go on.",
        ),
    ] = Switch.ON,
    tuning_configmap: Annotated[
        str,
        typer.Option(
            envvar="KVPILOT_TUNING_CONFIGMAP",
            help='NAMESPACE/NAME of a ConfigMap that switches tuning off with `tuning: "off"` at any time.',
        ),
    ] = "",
    metrics_port: Annotated[
        int,
        typer.Option(envvar="KVPILOT_METRICS_PORT", min=1, max=65535, help="Port of /metrics and /healthz."),
    ] = 8080,
    alerts_port: Annotated[
        int, typer.Option(envvar="KVPILOT_ALERTS_PORT", min=1, max=65535, help="Port of /alerts.")
    ] = 8081,
    kubeconfig: Annotated[
        Path | None,
        typer.Option(
            help="Kubeconfig, if the operator runs outside the cluster.", exists=True, dir_okay=False
        ),
    ] = None,
    log_level: Annotated[
        str, typer.Option(envvar="KVPILOT_LOG_LEVEL", help="DEBUG, INFO, WARNING or ERROR.")
    ] = "INFO",
) -> None:
    """Run the operator: watch KVCacheDeployments and keep them within their objectives, until SIGTERM."""
    from kvpilot_operator.cluster import logs
    from kvpilot_operator.cluster.service import OperatorOptions, operate

    config_map = _config_map(tuning_configmap)
    logs.configure(log_level.upper())
    if kubeconfig is not None:
        # Kopf reads the kubeconfig from the environment.
        os.environ["KUBECONFIG"] = str(kubeconfig)
    options = OperatorOptions(
        sources_file=sources_file,
        key_file=operator_key_file,
        kubeconfig=kubeconfig,
        alerts_token_file=alerts_token_file,
        namespaces=tuple(filter(None, (name.strip() for name in namespaces.split(",")))),
        pace_scale=pace_scale,
        metrics_port=metrics_port,
        alerts_port=alerts_port,
        tuning=tuning is Switch.ON,
        tuning_config_map=config_map,
    )
    try:
        asyncio.run(operate(options))
    except (OSError, ValueError) as error:
        typer.echo(f"kvpilot operator: {error}", err=True)
        raise typer.Exit(2) from error


def _config_map(text: str) -> Key | None:
    """The ConfigMap of the kill switch; None without one."""
    from kvpilot_operator.resource.fields import DNS_LABEL
    from kvpilot_operator.status.snapshot import Key

    if not text:
        return None
    namespace, _, name = text.partition("/")
    if not (DNS_LABEL.fullmatch(namespace) and DNS_LABEL.fullmatch(name)):
        message = f"--tuning-configmap: must be NAMESPACE/NAME, got {text}"
        typer.echo(f"kvpilot operator: {message}", err=True)
        raise typer.Exit(2)
    return Key(namespace, name)
