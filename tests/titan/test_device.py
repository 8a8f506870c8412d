import ctypes
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipes_for_tests import RECIPE, plan_of

from stackgrow.titan import device


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

    device = utils.device_module.current_device()
    torch.distributed.barrier(device_ids=[device])
    assert device == 0


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
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def pages_of_ten_steps() -> int:
    """Pages that the kernel gives anew while a step's activations come and go."""

    def step() -> None:
        activations = []
        for _ in range(8):
            activations.append(b"1" * (16 << 20))

    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_step_s_freed_memory_is_kept_for_the_next_one() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    ctypes.CDLL(None).mallopt(device.M_MMAP_THRESHOLD, 128 << 10)  # glibc's default
    handed_back = pages_of_ten_steps()
    device.keep_freed_memory()
    kept = pages_of_ten_steps()
    assert handed_back > 10_000
    assert kept < 100


def test_float8_is_refused_where_it_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, RECIPE, ["growth[1].train.precision=float8"])
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    if torch.cuda.is_available():
        assert "pip install stackgrow[float8]" in str(list(device.problems(plan)))
        return
    where, what = zip(*device.problems(plan), strict=True)
    assert set(where) == {"train.precision"}
    assert "needs the package torchao: pip install stackgrow[float8]" in what[0]
    assert "needs a GPU of compute capability 8.9 or newer" in what[1]


def test_float8_becomes_torchtitans_converter(tmp_path: Path) -> None:
    from stackgrow.titan.config import job_config
    from stackgrow.titan.job import StageJob

    plan = plan_of(tmp_path, RECIPE, ["growth[1].train.precision=float8"])
    configs = [
        job_config(StageJob(plan.recipe, stage, "hash", tmp_path, None))  # type: ignore[arg-type]
        for stage in plan.train_stages
    ]
    assert [c.model.converters for c in configs] == [[], [], ["quantize.linear.float8"]]
    assert configs[2].quantize.linear.float8.recipe_name == "rowwise"
    assert configs[2].quantize.linear.float8.filter_fqns == ["output"]
    assert configs[2].training.mixed_precision_param == "bfloat16"
