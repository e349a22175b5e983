"""The resource that a command speaks of: of a cluster, or of a local run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import typer

if TYPE_CHECKING:
    from kvpilot_operator.cli.arguments import Where
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


def find(name: str, where: Where) -> Target:
    """The local run of that name, unless a namespace or a context is given; without it, of the cluster.

    Raises:
        NotFoundError: there is none; names those that there are.
        CommandError: the options contradict each other, there is no such context, or no resource can have
            that name.
    """
    from kvpilot_operator.cli.in_cluster import find_in_cluster
    from kvpilot_operator.cli.local_run import find_run, runs_in
    from kvpilot_operator.local.state import ROOT

    _check_label("NAME", name)
    remote = _of_cluster(where)
    if where.run is not None:
        return find_run(name, where.run)
    if not remote and (ROOT / name / "resource.json").is_file():
        return find_run(name, ROOT)
    try:
        return find_in_cluster(name, where.namespace, where.context)
    except NotFoundError as error:
        local = "" if remote else f"; local runs in {ROOT}: {listed(runs_in(ROOT))}"
        raise NotFoundError(f"{error}{local}") from None


def find_all(where: Where, *, everywhere: bool = False) -> list[Target]:
    """Every local run; those of the cluster if an option asks for it or there is no local run.

    Args:
        everywhere: those of all namespaces of the cluster.

    Raises:
        CommandError: the options contradict each other, or the cluster cannot be asked.
    """
    from kvpilot_operator.cli.in_cluster import all_in_cluster
    from kvpilot_operator.cli.local_run import find_run, runs_in
    from kvpilot_operator.local.state import ROOT

    remote = _of_cluster(where, "--all-namespaces" if everywhere else "")
    if not remote:
        root = where.run or ROOT
        if names := runs_in(root):
            return [find_run(name, root) for name in names]
        if where.run is not None:
            raise NotFoundError(f"no runs in {where.run}")
    return [*all_in_cluster(where.namespace, where.context, everywhere=everywhere)]


def _of_cluster(where: Where, flag: str = "") -> bool:
    """True if an option asks for a cluster.

    Raises:
        CommandError: another one asks for a local run, or no namespace can have that name.
    """
    if where.namespace:
        _check_label("--namespace", where.namespace)
    given = {"--namespace": where.namespace, "--context": where.context, flag: flag}
    asked = [(option, value) for option, value in given.items() if value]
    if asked and where.run is not None:
        option, value = asked[0]
        got = "" if option == value else f", got {value}"
        raise CommandError(f"{option}: cannot go with --run{got}")
    return bool(asked)


def _check_label(option: str, text: str) -> None:
    """Refuse a name that no object has, before it becomes a part of a path.

    Raises:
        CommandError: it is no DNS label.
    """
    from kvpilot_operator.resource.fields import DNS_LABEL

    if not DNS_LABEL.fullmatch(text):
        raise CommandError(f"{option}: must be a DNS label such as chat, got {text[:60]!r}")


def listed(names: list[str]) -> str:
    """Names for an error message."""
    return ", ".join(sorted(names)) or "none"
