"""CPU time of one decision, by the number of replicas.

A simulated fleet goes from idle over a breach, a change and its end to a load that needs more replicas. Every
input that ``decide`` got there is decided on again, as often as ``--runs`` says; the quickest counts, because
on a shared machine the others show what else ran.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import command, results
from bench.command import FAILED, CannotRunError
from kvpilot_operator.backtest.parallel import prepare
from kvpilot_operator.backtest.simulation import Simulation
from kvpilot_operator.reconcile.reconciler import Reconciliation
from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.observation import Observation, ObservedReplica, Sample
from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.state import TuningState

REPLICAS = (3, 20, 50)
SECONDS = 300.0
TARGET_P99_MS = 2.0


@dataclass(frozen=True)
class Inputs:
    """What one decision depends on."""

    observation: Observation
    state: TuningState
    policy: Policy


class Recorded(Simulation):
    """A simulation that keeps the inputs of every decision."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.inputs: list[Inputs] = []
        super().__init__(*args, **options)

    def reconciled(self, result: Reconciliation) -> None:
        """Keep what was observed, and the state that was left by the decision before."""
        before = self.decisions[-1][1].state if self.decisions else TuningState()
        self.inputs.append(Inputs(result.observation, before, result.policy))
        super().reconciled(result)


def recorded(replicas: int) -> list[Inputs]:
    """Inputs of the decisions of a fleet whose load rises to what its slots, then its replicas cannot hold.

    Raises:
        CannotRunError: no change began, so that the figures would leave out the dearest decisions.
    """
    manifest = {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheDeployment",
        "metadata": {"name": "chat", "namespace": "default", "uid": "u", "generation": 1},
        "spec": {
            "engine": {"config": {"numWorkers": 2, "batchSize": 2}},
            "objectives": {"hitRate": "0%"},
            "tuning": {"mode": "Auto", "pace": "Fast"},
            "scaling": {"min": replicas - 1, "max": replicas},
        },
    }
    simulation = Recorded(
        manifest,
        replicas=replicas - 1,
        load=lambda seconds: replicas * (7.0 if seconds < 60 else 40.0 if seconds < 200 else 120.0),
    )
    simulation.run(SECONDS)
    if not {"Started", "Promoted", "ScaledOut"} <= set(simulation.outcomes()):
        raise CannotRunError(f"the simulation has other decisions than expected: {simulation.outcomes()}")
    return simulation.inputs


def fresh(observation: Observation) -> Observation:
    """The observation as it is gathered: no sum of it was computed yet."""

    def sample(old: Sample | None) -> Sample | None:
        windows = {} if old is None else {name: replace(counts) for name, counts in old.windows.items()}
        return old if old is None else replace(old, windows=windows)

    def replica(old: ObservedReplica) -> ObservedReplica:
        return replace(old, sample=sample(old.sample))

    return replace(observation, replicas=tuple(map(replica, observation.replicas)))


def milliseconds(inputs: Inputs, runs: int) -> float:
    """Least CPU time of a decision on these inputs, ms."""
    taken = []
    for _ in range(runs):
        observation = fresh(inputs.observation)
        begun = time.thread_time()
        decide(observation, inputs.state, inputs.policy, observation.at)
        taken.append(time.thread_time() - begun)
    return 1000 * min(taken)


def main(argv: list[str] | None = None) -> int:
    """Write the figures; exit status 1 if the largest fleet misses the target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="of each decision; the quickest counts")
    parser.add_argument("--output", type=Path, default=results.DIRECTORY)
    options = parser.parse_args(argv)
    prepare()
    figures: dict[str, Any] = {"target_p99_ms": TARGET_P99_MS}
    p99 = 0.0
    for replicas in REPLICAS:
        taken = [milliseconds(inputs, options.runs) for inputs in recorded(replicas)]
        p99 = results.percentile(taken, 0.99)
        figures[f"{replicas} replicas"] = (
            f"{len(taken)} decisions, median {statistics.median(taken):.2f} ms, p99 {p99:.2f} ms, "
            f"most {max(taken):.2f} ms"
        )
    print(results.write("decide", "CPU time of a decision", figures, options.output).read_text())
    return 0 if p99 <= TARGET_P99_MS else FAILED


if __name__ == "__main__":
    sys.exit(command.run("decide", main))
