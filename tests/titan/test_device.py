import subprocess
import sys

import pytest
import torch


def test_torchtitan_sees_the_cpu() -> None:
    from torchtitan.components.metrics import build_device_memory_monitor
    from torchtitan.tools import utils

    if torch.cuda.is_available():
        pytest.skip("the CPU device stands aside for a GPU")
    assert utils.device_type == "cpu"
    stats = build_device_memory_monitor().get_peak_stats()
    assert 0.05 < stats.max_reserved_gib < 64, "this process's peak memory"
    assert 0 < stats.max_reserved_pct < 100


def test_barrier_accepts_the_current_device() -> None:
    from torchtitan.tools import utils

    torch.distributed.barrier(device_ids=[utils.device_module.current_device()])


def test_inert_when_torch_has_an_accelerator() -> None:
    """In a process where torch reports an accelerator, torchtitan gets torch's own answer."""
    script = """
import torch, torch._utils
torch._utils._get_available_device_type = lambda: "meta_accelerator"
torch.meta_accelerator = object()
import stackgrow.titan
from torchtitan.tools import utils
assert utils.device_type == "meta_accelerator", utils.device_type
assert utils.device_module is torch.meta_accelerator
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
