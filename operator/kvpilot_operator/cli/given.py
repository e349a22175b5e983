"""What a command line gives itself: an option that would change nothing must not go unnoticed."""

from __future__ import annotations

import typer


def given(context: typer.Context) -> frozenset[str]:
    """Parameters, by their names in Python, whose values come from the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(name for name, source in sources.items() if source and source.name == "COMMANDLINE")
