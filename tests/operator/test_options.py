"""Output files: a file that cannot be written is reported before a run, or at its end in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvpilot_operator.options import OptionError, check_files, write_file


def test_a_file_that_cannot_be_written_is_refused() -> None:
    path = Path("/proc/x.json")
    message = "--json: cannot be written: No such file or directory, got /proc/x.json"
    with pytest.raises(OptionError, match=message):
        check_files({}, {"--json": path})


def test_the_check_leaves_files_as_they_are(tmp_path: Path) -> None:
    there, new, pipe = tmp_path / "there", tmp_path / "new", tmp_path / "pipe"
    there.write_text("earlier")
    os.mkfifo(pipe)  # opening it would wait for a reader
    check_files({}, {"--json": there, "--report": new, "--pipe": pipe})
    assert there.read_text() == "earlier"
    assert not new.exists()


def test_a_file_that_could_not_be_written_is_shown_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert not write_file("kvpilot load", Path("/proc/x.json"), "{}")
    reported = capsys.readouterr()
    assert reported.err == "kvpilot load: /proc/x.json: cannot be written: No such file or directory\n"
    assert reported.out == ""
