"""Percentiles of a benchmark, and its figures in ``bench/results``."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kvpilot_operator.load import results as load_results

DIRECTORY = Path(__file__).parent / "results"


def percentile(values: Iterable[float], share: float) -> float:
    """Nearest-rank percentile of at least one value."""
    found = load_results.percentile(sorted(values), share)
    assert found is not None
    return found


def command() -> str:
    """The present command line, without paths of this machine: an absolute one is its last part."""
    given = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
    return " ".join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *given])


def write(name: str, title: str, figures: dict[str, Any], directory: Path = DIRECTORY) -> Path:
    """Write ``name.json`` and ``name.md`` with command, time and machine; path of the latter."""
    directory.mkdir(parents=True, exist_ok=True)
    about = {
        "command": command(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
    }
    (directory / f"{name}.json").write_text(json.dumps({**about, **figures}, indent=2) + "\n")
    rows = "\n".join(f"| {key} | {value} |" for key, value in figures.items())
    text = (
        f"# {title}\n\n`{about['command']}`, {about['when']}, {about['machine']}, torch {about['torch']}\n\n"
    )
    path = directory / f"{name}.md"
    path.write_text(f"{text}| figure | value |\n|---|---|\n{rows}\n")
    return path
