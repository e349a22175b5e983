"""What commands print: text for people, JSON or YAML for programs. Colours only on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

PIPE_COLUMNS = 10_000
"""Width without a terminal: a program reads whole lines."""


class Format(StrEnum):
    """Output formats."""

    TEXT = "text"
    JSON = "json"
    YAML = "yaml"


def console() -> Console:
    """Standard output; without colours where it is no terminal, or where NO_COLOR is set."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    return Console(width=width, highlight=False, markup=False, emoji=False)


def emit(output: Format, document: Any, text: Callable[[], Any]) -> None:
    """Print a document in a format; ``text`` makes what people read: a list of lines, or a table."""
    if output is Format.JSON:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    elif output is Format.YAML:
        import yaml

        sys.stdout.write(yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    else:
        shown = text()
        for item in shown if isinstance(shown, (list, tuple)) else [shown]:
            _print(console(), item)


def _print(out: Console, item: Any) -> None:
    from rich.table import Table

    if out.is_terminal or not isinstance(item, Table):
        out.print(item, soft_wrap=not isinstance(item, Table))
        return
    with out.capture() as padded:
        out.print(item)
    for line in padded.get().splitlines():
        sys.stdout.write(line.rstrip() + "\n")


def table(headings: Sequence[str], rows: Iterable[Sequence[str | Text]], wrapping: int = 1) -> Table:
    """A table without lines, as kubectl prints it; only the last ``wrapping`` columns wrap."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        made.add_column(heading, no_wrap=index < len(headings) - wrapping)
    for row in rows:
        made.add_row(*row)
    return made


COLOURS = {
    "Met": "green",
    "Breached": "red",
    "Infeasible": "yellow",
    "Promoted": "green",
    "Reverted": "red",
    "Aborted": "yellow",
    "Hold": "yellow",
    "Emergency": "red",
}
"""Colour of a word that says how something is."""


def coloured(word: str, text: str = "") -> Text:
    """``text`` (or the word itself) in the colour of a word."""
    from rich.text import Text

    return Text(text or word, style=COLOURS.get(word, ""))
