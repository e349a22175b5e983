"""Records what real engines show under loads that put one part of the cache at fault.

``python -m tests.operator.tuning.record`` writes ``recorded/*.json`` anew, one observation each; the
tests of the rules read them. Nothing is tuned while it records.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tests.operator.local.deployment import Deployment, Traffic, manifest_of, users

from kvpilot_operator.reconcile.reconciler import Reconciliation
from kvpilot_operator.tuning.observation import Observation

FOLDER = Path(__file__).parent / "recorded"


@dataclass(frozen=True)
class Scenario:
    """One engine and the few prompts that its users ask for again and again."""

    config: dict[str, Any]
    prompt_tokens: int
    prompts: int
    number_of_users: int = 1


LONG = {"maxTokens": 8192, "hostMemoryMb": 256, "numWorkers": 4, "batchSize": 4, "maxStepTokens": 1024}
SCENARIOS = {
    # Eight prompts of 4,080 tokens, two of which the device pool holds: the others come from the host tier.
    "loads_one_by_one": Scenario({**LONG, "useCompression": False, "enablePrefetch": False}, 4080, 8),
    "loads_that_decode": Scenario(
        {
            **LONG,
            "useCompression": True,
            "compressionRatio": 0.32,
            "enablePrefetch": True,
            "prefetchSize": 64,
        },
        4080,
        8,
    ),
    # Twelve prompts of 1,024 tokens, half of which fit.
    "few_hits": Scenario(
        {"maxTokens": 6144, "hostMemoryMb": 0, "numWorkers": 4, "batchSize": 4}, 1024, 12, 2
    ),
}


def recorded(name: str) -> Observation:
    """The observation of that scenario."""
    return msgspec.json.decode((FOLDER / f"{name}.json").read_bytes(), type=Observation)


async def observe(scenario: Scenario, directory: Path) -> Observation:
    """The first whole observation of an engine whose cache has been in use for two long windows."""
    manifest = manifest_of(scenario.config, replicas=1, tuning={"mode": "Off", "pace": "Fast"})
    deployment = Deployment(directory, manifest)
    traffic = Traffic(scenario.prompt_tokens, 1, scenario.prompts)

    def trusted(result: Reconciliation) -> bool:
        return result.observation.at > warm_at and not result.decision.state.holds

    async with deployment.running() as client:
        started = await deployment.until(lambda _: True, 10)
        warm_at = started.observation.at + 2 * started.policy.pace.long
        async with users(client, traffic, scenario.number_of_users):
            return (await deployment.until(trusted, 200)).observation


def main() -> None:
    """Record the scenarios that are named, or all."""
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or SCENARIOS:
        with tempfile.TemporaryDirectory() as directory:
            observation = asyncio.run(observe(SCENARIOS[name], Path(directory)))
        text = msgspec.json.format(msgspec.json.encode(observation), indent=1)
        (FOLDER / f"{name}.json").write_bytes(text + b"\n")
        print(f"recorded {name}")


if __name__ == "__main__":
    main()
