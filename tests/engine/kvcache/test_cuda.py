"""The same cache on a CUDA device, where there is one."""

from __future__ import annotations

import pytest
import torch

from kvpilot_engine.kvcache import Fidelity, KVLayout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize(
    ("ratio", "fidelity"), [(1.0, Fidelity.EXACT), (0.52, Fidelity.INT8), (0.3, Fidelity.INT4)]
)
def test_blocks_leave_the_device_and_come_back(make, ratio, fidelity):
    layout = KVLayout(4, 2, 64, torch.float16, torch.device("cuda"))
    h = make(layout, max_tokens=1024, host_memory_mb=64, use_compression=True, compression_ratio=ratio)
    for seed in range(6):
        h.serve(h.prompt(seed, 300))
        h.flush()
    assert h.serve(h.prompt(0, 257)) == (256, fidelity)
    assert h.cache.free_slab_bytes == 0
    assert h.cache.ceilings() == {"maxTokens": 2048}
