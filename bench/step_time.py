"""Time of a decode step by number of rows, and of a prefill, on the built-in model.

CPU time of the one torch thread is reported with wall time, because on a shared machine wall time includes
waiting for a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import command, results
from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract.config import QUIET
from kvpilot_engine.model.determinism import make_deterministic
from kvpilot_engine.model.loading import load_model
from kvpilot_engine.model.runner import ModelRunner, Work

ROWS = (1, 2, 4, 8, 16, 32)
POOL_PAGES = 4096


def timed(runner: ModelRunner, works: list[Work], k: torch.Tensor, v: torch.Tensor, runs: int) -> str:
    """Lower quartile of the CPU time of a step and minimum of its wall time, ms: ``CPU (wall)``."""
    cpu, wall = [], []
    for _ in range(runs):
        before = time.process_time(), time.perf_counter()
        runner.run(works, k, v).argmax(dim=-1).tolist()
        cpu.append(time.process_time() - before[0])
        wall.append(time.perf_counter() - before[1])
    return f"{1000 * sorted(cpu)[runs // 4]:.2f} ({1000 * min(wall):.2f}) ms"


def measure(dtype: str, deterministic: bool, runs: int) -> dict[str, Any]:
    """Decode steps by number of rows for two lengths on scattered pages, then three prefills; ms."""
    config = KVCacheConfig.model_validate({"dtype": dtype, "device": "cpu"}, context=QUIET)
    model = load_model("builtin/tiny-llama", config)
    if deterministic:
        make_deterministic(model.module)
    runner = ModelRunner(model, deterministic)
    shape = (model.layers, POOL_PAGES * 16, model.kv_heads, model.head_dim)
    k, v = torch.randn(shape).to(model.dtype), torch.randn(shape).to(model.dtype)
    order = np.random.default_rng(0).permutation(POOL_PAGES).tolist()
    figures: dict[str, Any] = {"dtype": dtype, "deterministic": deterministic}
    for length in (64, 512):
        pages = length // 16
        works = [
            Work([65], length - 1 - row % 16, order[row * pages : (row + 1) * pages], sample=True)
            for row in range(ROWS[-1])
        ]
        for rows in ROWS:
            figures[f"decode {length} tokens, {rows} rows"] = timed(runner, works[:rows], k, v, runs)
    for name, start, count in (("512", 0, 512), ("1024", 0, 1024), ("16 behind 1024 cached", 1024, 16)):
        work = Work([65] * count, start, order[:65], sample=True)
        figures[f"prefill {name}"] = timed(runner, [work], k, v, max(5, runs // 4))
    return figures


def main(argv: list[str] | None = None) -> int:
    """Write the figures; exit status 0, because there is no target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--output", type=Path, default=results.DIRECTORY)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    figures = measure(options.dtype, options.deterministic, options.runs)
    name = f"step_time_{options.dtype}" + ("_deterministic" if options.deterministic else "")
    print(results.write(name, "Step time, CPU (wall), one thread", figures, options.output).read_text())
    return 0


if __name__ == "__main__":
    sys.exit(command.run("step_time", main))
