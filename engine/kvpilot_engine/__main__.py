"""``python -m kvpilot_engine``: serve one model over HTTP."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from kvpilot_engine.contract import ConfigWarning, KVCacheConfig, config_errors
from kvpilot_engine.contract.admin import Serial

TOKEN_VARIABLE = "KVPILOT_ADMIN_TOKEN"

PROGRAM_VARIABLE = "KVPILOT_PROGRAM"
"""Environment variable with the program name for the usage line, set by a command that runs this one."""


class ConfigFile(BaseModel):
    """Content of the file of ``--config``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generation: Serial = 0
    epoch: Serial = 0
    config: KVCacheConfig = KVCacheConfig()


class _FileError(Exception):
    """The file cannot be used; the text has one line for each fault."""


def read_config(path: Path) -> ConfigFile:
    """Read a YAML or JSON file, and print its warnings to stderr.

    Raises:
        _FileError: with one line for each fault.
    """
    try:
        content: Any = yaml.safe_load(path.read_text())
    except OSError as error:
        raise _FileError(f"--config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise _FileError(
            f"--config: {path} is neither YAML nor JSON: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(content, dict):
        raise _FileError(f"--config: {path} must hold a mapping of generation, epoch and config")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConfigWarning)
        try:
            parsed = ConfigFile.model_validate(content)
        except ValidationError as error:
            raise _FileError("\n".join(f"--config: {line}" for line in config_errors(error))) from None
    for warning in caught:
        typer.echo(f"kvpilot-engine: warning: {warning.message}", err=True)
    return parsed


def token_source(file: Path | None) -> Any:
    """A function that returns the admin token. A file is read for each request, so that it can be renewed."""
    if file is None:
        from_environment = os.environ.get(TOKEN_VARIABLE)
        return lambda: from_environment

    def from_file() -> str | None:
        try:
            return file.read_text().strip() or None
        except OSError:
            return None

    return from_file


def main(  # noqa: PLR0917
    model: Annotated[str, typer.Option(help="Built-in model, or a model directory.")] = "builtin/tiny-llama",
    revision: Annotated[str, typer.Option(help="Revision of the weights.")] = "",
    config: Annotated[
        Path | None, typer.Option(help="YAML or JSON file with generation, epoch and config.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address of the main port.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the OpenAI API, the probes and the metrics.")
    ] = 8000,
    admin_host: Annotated[
        str | None, typer.Option(help="Address of the admin port; by default that of --host.")
    ] = None,
    admin_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the admin API.")] = 8001,
    admin_token_file: Annotated[
        Path | None, typer.Option(help=f"File with the bearer token; by default {TOKEN_VARIABLE} holds it.")
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=1.0, help="Longest time from the signal to the exit, s.")
    ] = 30.0,
    drain_lag_seconds: Annotated[
        float,
        typer.Option(min=0.0, help="Time after the signal during which new connections are accepted, s."),
    ] = 2.0,
    access_log: Annotated[bool, typer.Option(help="Log one line for each request.")] = False,
) -> None:
    """Serve one model: OpenAI's API on one port, the admin API on another."""
    try:
        start = read_config(config) if config is not None else ConfigFile()
    except _FileError as error:
        for line in str(error).splitlines():
            typer.echo(f"kvpilot-engine: error: {line}", err=True)
        raise typer.Exit(2) from None
    # Slow to import: neither --help nor a wrong file needs it.
    from kvpilot_engine.server.lifecycle import ServeOptions, serve  # noqa: PLC0415

    raise typer.Exit(
        serve(
            ServeOptions(
                model=model,
                revision=revision,
                config=start.config,
                generation=start.generation,
                epoch=start.epoch,
                host=host,
                port=port,
                admin_host=admin_host or host,
                admin_port=admin_port,
                drain_seconds=drain_seconds,
                drain_lag_seconds=min(drain_lag_seconds, drain_seconds / 2),
                admin_token=token_source(admin_token_file),
                access_log=access_log,
            )
        )
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    app(prog_name=os.environ.get(PROGRAM_VARIABLE, "python -m kvpilot_engine"))
