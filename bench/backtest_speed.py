"""How many times faster than real time ``kvpilot backtest`` plays a load: seconds played over CPU seconds.

Each run is one seed of one load that kvpilot manages, on one core, as the command plays it; the fastest of
several counts, because a neighbour on the machine makes every run slower. To fit the simulated device to the
manifest costs the command once per load, and is given beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import command, results
from bench.command import FAILED, CannotRunError
from kvpilot_operator.backtest.contest import TUNED, ContestRun, play
from kvpilot_operator.backtest.parallel import prepare
from kvpilot_operator.backtest.scenes import SYNTHETIC, LoadSpec, Scene, scene_of
from kvpilot_operator.load.workload import LoadError
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.resource.load import load_document

MANIFEST = Path(__file__).parents[1] / "examples" / "production.yaml"
TARGET = 1000.0


@dataclass(frozen=True)
class Played:
    """One load: the fastest run of it, and what its preparation took; CPU times in s."""

    scene: Scene
    cpu_s: float
    fitting_cpu_s: float

    @property
    def speed(self) -> float:
        """Seconds played per second of CPU time."""
        return self.scene.seconds / self.cpu_s

    def __str__(self) -> str:
        played = f"{self.scene.seconds:.0f} s of {self.scene.mean:.0f} requests/s in {self.cpu_s:.2f} s"
        return f"{self.speed:.0f} ({played}, {self.fitting_cpu_s:.2f} s before)"


def fitted(manifest: Mapping[str, Any], load: LoadSpec) -> tuple[Scene, float]:
    """The scene of a load, and the CPU time that it took, s."""
    began = time.process_time()
    scene = scene_of(manifest, load)
    return scene, time.process_time() - began


def fastest(manifest: Mapping[str, Any], scene: Scene, seed: int, runs: int) -> float:
    """CPU time of the fastest of several equal runs, s."""
    took = []
    for _ in range(runs):
        began = time.process_time()
        play(ContestRun(manifest, scene, TUNED, "", seed))
        took.append(time.process_time() - began)
    return min(took)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the figures; exit status 1 if a load is played less than TARGET times faster than real time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, default=MANIFEST)
    parser.add_argument("--trace", type=Path, action="append", default=[], help="play this file as well")
    parser.add_argument("--duration", type=float, help="stop each load after so many seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3, help="of each load")
    parser.add_argument("--output", type=Path, default=results.DIRECTORY)
    options = parser.parse_args(argv)
    loads = [
        *(LoadSpec(synthetic=name, seconds=options.duration) for name in SYNTHETIC),
        *(LoadSpec(trace=path, seconds=options.duration) for path in options.trace),
    ]
    try:
        manifest = load_document(options.manifest)
        scenes = [fitted(manifest, load) for load in loads]
    except (ManifestError, LoadError) as error:
        raise CannotRunError(str(error)) from error
    prepare()
    found = [
        Played(scene, fastest(manifest, scene, options.seed, options.runs), fitting)
        for scene, fitting in scenes
    ]
    figures = {played.scene.load.title: str(played) for played in found}
    written = results.write(
        "backtest_speed", "Speed of a backtest against real time", figures, options.output
    )
    print(written.read_text())
    slow = [f"{played.scene.load.title} {played.speed:.0f}" for played in found if played.speed < TARGET]
    if slow:
        print(f"backtest_speed: FAILED: below {TARGET:g}: {', '.join(slow)}")
    return FAILED if slow else 0


if __name__ == "__main__":
    sys.exit(command.run("backtest_speed", main))
