"""``python -m bench [NAME ...]``: run the benchmarks one after the other; exit status 1 when one fails."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = ("step_time", "first_token", "front_cost", "knob_effects", "trace_hit_rate")


def main(names: list[str]) -> int:
    """Run the named benchmarks, each in a process of its own; all of them without a name."""
    if unknown := sorted(set(names) - set(BENCHMARKS)):
        print(f"bench: {', '.join(unknown)} is none of {', '.join(BENCHMARKS)}")
        return 2
    failed = []
    for name in names or BENCHMARKS:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"bench.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"bench: failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
