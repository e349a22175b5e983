"""``kubectl_complete-kvpilot``: completes ``kubectl kvpilot``, which kubectl leaves to this program."""

from __future__ import annotations

import os
import sys

COMPLETE = "_KVPILOT_COMPLETE"
NO_FILES = ":4"
"""The last line that kubectl expects: no file names besides."""


def kubectl() -> None:
    """Print the completions of the last word of the command line, one in each line."""
    from kvpilot_operator.cli import app

    os.environ[COMPLETE] = "complete_bash"
    words = sys.argv[1:] or [""]
    os.environ["COMP_WORDS"] = " ".join(["kvpilot", *words])
    os.environ["COMP_CWORD"] = str(len(words))
    sys.argv[:] = ["kvpilot"]
    try:
        app(prog_name="kvpilot")
    except SystemExit:
        print(NO_FILES)
