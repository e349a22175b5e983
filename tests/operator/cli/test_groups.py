"""Options that several commands share are defined once; every command shows an example of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from kvpilot_operator.cli import app
from kvpilot_operator.cli.groups import grouped


@dataclass(frozen=True)
class Shared:
    """Two options."""

    size: Annotated[int, typer.Option("--size", "-s", help="How large.")] = 1
    colour: Annotated[str | None, typer.Option(help="Which colour.")] = None


LARGE = Shared(size=9)


def test_a_group_is_its_options_and_comes_as_one_value() -> None:
    seen: list[Any] = []

    def paint(name: Annotated[str, typer.Argument()], shared: Shared = LARGE, last: int = 3) -> None:
        """Paint."""
        seen.append((name, shared, last))

    # The annotations name what only this function knows.
    paint.__annotations__ = {"name": Annotated[str, typer.Argument()], "shared": Shared, "last": int}
    program = typer.Typer()
    program.command()(grouped(paint))
    for line in (["wall"], ["wall", "-s", "2", "--colour", "red", "--last", "4"]):
        assert CliRunner().invoke(program, line).exit_code == 0
    assert seen == [("wall", LARGE, 3), ("wall", Shared(2, "red"), 4)]
    assert "Paint." in CliRunner().invoke(program, ["--help"]).output


COMMANDS: dict[str, Any] = getattr(get_command(app), "commands", {})


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example_of_itself(name: str) -> None:
    assert f"`kvpilot {name}" in (COMMANDS[name].epilog or "")
