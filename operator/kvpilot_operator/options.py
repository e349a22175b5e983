"""Checks of command-line options that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import typer

TRACE_OPTIONS = ("speed", "shrink")
"""Options that only a trace uses, by their names in Python."""


class OptionError(ValueError):
    """An invalid option: one line with the option, the value and what is allowed."""


def given_options(context: typer.Context) -> frozenset[str]:
    """Parameters, by their names in Python, whose values come from the command line and not from defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(name for name, source in sources.items() if source and source.name == "COMMANDLINE")


def check_unused(given: Collection[str], unused: Iterable[str], why: str) -> None:
    """Refuse given options, by their names in Python, that would have no effect.

    Raises:
        OptionError: an unused option is given; names the option and ``why``.
    """
    for name in unused:
        if name in given:
            raise OptionError(f"--{name.replace('_', '-')}: {why}")


def check_files(read: Mapping[str, Path | None], written: Mapping[str, Path | None]) -> None:
    """Refuse output files, by option, that cannot be written or are another file of the command.

    Raises:
        OptionError: the directory does not exist, the file is a directory or cannot be written, or another
            option names the same file.
    """
    used = {path.resolve(): option for option, path in read.items() if path is not None}
    for option, path in written.items():
        if path is None:
            continue
        if path.is_dir() or not path.parent.is_dir():
            raise OptionError(f"{option}: must be a file in a directory that exists, got {path}")
        if (other := used.setdefault(path.resolve(), option)) != option:
            raise OptionError(f"{option}: must be another file than that of {other}, got {path}")
        try:
            _try_to_write(path)
        except OSError as error:
            raise OptionError(f"{option}: cannot be written: {error.strerror}, got {path}") from error


def _try_to_write(path: Path) -> None:
    exists = path.exists()
    if exists and not path.is_file():
        return  # opening a pipe and closing it again would end its reader
    with path.open("a"):
        pass
    if not exists:
        path.unlink()


def write_file(program: str, path: Path, text: str) -> bool:
    """Write an output file; if that fails at the end of a run, print one line and return False."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"{program}: {path}: cannot be written: {error.strerror}", file=sys.stderr)
        return False
    return True
