"""The reference page of the command line, generated from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

from typer.main import get_command

from kvpilot_operator.cli import app

_INTRODUCTION = (
    "# Commands\n\n"
    "`kvpilot VERB`, also `kubectl kvpilot VERB`. See [operate](../guides/operate.md). Exit codes: 0, 1 "
    "if what was asked for failed, 2 if it cannot be done, with one line that says why.\n"
)


def commands_page() -> str:
    """The whole page but its header."""
    found: dict[str, Any] = getattr(get_command(app), "commands", {})
    return _INTRODUCTION + "".join(
        part for name, command in found.items() for part in _command(name, command)
    )


def _command(name: str, command: Any) -> Iterator[str]:
    shown = [item for item in command.params if not getattr(item, "hidden", False) and item.name != "help"]
    arguments = [item for item in shown if item.param_type_name == "argument"]
    options = [item for item in shown if item.param_type_name == "option"]
    words = [item.name.upper() if item.required else f"[{item.name.upper()}]" for item in arguments]
    yield f"\n## kvpilot {' '.join([name, *words])}\n\n{' '.join((command.help or '').split())}\n"
    if command.epilog:
        yield f"\n{command.epilog}\n"
    rows = [*((f"`{item.name.upper()}`", "", item) for item in arguments)]
    rows += [(", ".join(f"`{name}`" for name in item.opts), _default(item), item) for item in options]
    if rows:
        yield "\n| Argument or option | Default | Meaning |\n| --- | --- | --- |\n"
    for left, default, item in rows:
        yield f"| {left} | {default} | {' '.join((item.help or '').split())} |\n"


def _default(option: Any) -> str:
    value = option.default
    if value in {None, "", False}:
        return ""
    return f"`{value.value if isinstance(value, Enum) else value}`"
