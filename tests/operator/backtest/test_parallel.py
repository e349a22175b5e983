"""Independent runs on all cores: their order, and that no process outlives the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from kvpilot_operator.backtest.parallel import in_parallel

COMMAND = """
import time
from kvpilot_operator.backtest.parallel import in_parallel
for _ in in_parallel(time.sleep, [0, 60, 60]):
    print("one job has ended", flush=True)
"""


def test_results_come_in_the_order_of_the_jobs() -> None:
    assert list(in_parallel(abs, [-3, -1, -2])) == [3, 1, 2]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core plays the jobs in one process")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_a_command_that_is_killed(end: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", COMMAND], stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"one job has ended\n"
        workers = psutil.Process(command.pid).children()
        assert len(workers) >= 2
        command.send_signal(end)
        assert command.wait(20) == -end
        _, left = psutil.wait_procs(workers, timeout=20)
        assert left == []
