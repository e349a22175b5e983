"""``python -m scripts.generate [--check]``."""

from __future__ import annotations

import sys

from scripts.generate.definitions import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
