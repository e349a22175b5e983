"""``python -m bench [NAME ...]``: run the benchmarks one after another and print the result of each."""

from __future__ import annotations

import subprocess
import sys

from bench.command import CANNOT_RUN, FAILED

BENCHMARKS = (
    "decide",
    "step_time",
    "first_token",
    "front_cost",
    "knob_effects",
    "calibration",
    "backtest_speed",
    "time_to_cure",
    "trace_hit_rate",
)
VERDICTS = {0: "passed", FAILED: "FAILED", CANNOT_RUN: "DID NOT RUN"}


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all, each in its own process; exit status 0 if all ran and passed."""
    if unknown := sorted(set(names) - set(BENCHMARKS)):
        print(f"bench: {', '.join(unknown)}: unknown, allowed: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return CANNOT_RUN
    codes = {}
    for name in names or BENCHMARKS:
        print(f"== {name}", flush=True)
        codes[name] = subprocess.run([sys.executable, "-m", f"bench.{name}"], check=False).returncode
    print("== summary")
    for name, code in codes.items():
        print(f"{name:16} {VERDICTS.get(code, f'CRASHED with status {code}')}")
    return FAILED if any(codes.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
