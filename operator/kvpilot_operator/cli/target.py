"""The resource that a command speaks of: of a cluster, or of a local run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

if TYPE_CHECKING:
    from kvpilot_operator.status.snapshot import Key

Json = Mapping[str, Any]


class CommandError(Exception):
    """A command cannot be carried out; the message is one sentence. Exit code 2."""


class NotFoundError(CommandError):
    """The resource does not exist or cannot be read."""


class Target(Protocol):
    """One resource, wherever it lives.

    Attributes:
        manifest: the whole object, status included, as it was when it was found.
        ended: it is of a local run that has ended.
        options: command-line options that find it again, with a space before: `` -n team-a``.
    """

    key: Key
    manifest: Json
    ended: bool
    options: str

    def records(self) -> list[Json]:
        """Whole decision records, oldest first."""

    def overrides(self) -> list[Json]:
        """All overrides of its namespace."""

    def create(self, override: Json) -> str:
        """Store an override; returns its name.

        Raises:
            CommandError: it is refused.
        """

    def delete(self, override: str) -> None:
        """Delete an override; one that is gone already is no error.

        Raises:
            CommandError: it is refused.
        """

    def pages(self) -> dict[str, str | None]:
        """Text of the metrics page of each replica by its name; None for one that does not answer.

        Raises:
            CommandError: this user may not read them.
        """

    def user(self) -> str:
        """Who runs the command."""


@contextmanager
def reporting(command: str) -> Iterator[None]:
    """Print the error of a command as one line, and exit with 2."""
    try:
        yield
    except CommandError as error:
        for line in str(error).splitlines():
            typer.echo(f"kvpilot {command}: {line}", err=True)
        raise typer.Exit(2) from None


def find(name: str, namespace: str = "", run: Path | None = None) -> Target:
    """The local run of that name, unless a namespace is given; without a run the resource of the cluster.

    Raises:
        NotFoundError: there is none; names those that there are.
    """
    from kvpilot_operator.cli.in_cluster import find_in_cluster
    from kvpilot_operator.cli.local_run import find_run, runs_in
    from kvpilot_operator.local.state import ROOT

    _either(namespace, run)
    if run is not None:
        return find_run(name, run)
    if not namespace and (ROOT / name / "resource.json").is_file():
        return find_run(name, ROOT)
    try:
        return find_in_cluster(name, namespace)
    except NotFoundError as error:
        local = "" if namespace else f"; local runs in {ROOT}: {listed(runs_in(ROOT))}"
        raise NotFoundError(f"{error}{local}") from None


def find_all(namespace: str = "", run: Path | None = None, *, everywhere: bool = False) -> list[Target]:
    """Every local run; those of the cluster if a namespace is given or there is no local run.

    Args:
        everywhere: those of all namespaces of the cluster.

    Raises:
        NotFoundError: the cluster cannot be asked.
    """
    from kvpilot_operator.cli.in_cluster import all_in_cluster
    from kvpilot_operator.cli.local_run import find_run, runs_in
    from kvpilot_operator.local.state import ROOT

    _either(namespace or ("--all-namespaces" if everywhere else ""), run)
    if run is not None or not (namespace or everywhere):
        root = run or ROOT
        if names := runs_in(root):
            return [find_run(name, root) for name in names]
        if run is not None:
            raise NotFoundError(f"no runs in {run}")
    return [*all_in_cluster(namespace, everywhere=everywhere)]


def _either(namespace: str, run: Path | None) -> None:
    if run is not None and namespace:
        raise NotFoundError(f"--namespace: cannot go with --run, got {namespace}")


def listed(names: list[str]) -> str:
    """Names for an error message."""
    return ", ".join(sorted(names)) or "none"
