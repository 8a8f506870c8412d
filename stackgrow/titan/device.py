"""A CPU device for torchtitan 0.2.2, which knows only accelerators; and whether a plan fits the device that is there.

torchtitan asks torch for an accelerator when it is imported, falls back to "cuda", and then calls functions that
``torch.cpu`` lacks. ``install`` answers those calls on a machine without an accelerator and does nothing elsewhere.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import resource
import shutil
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils

from stackgrow.plan.stages import Plan
from stackgrow.recipe.keys import Recipe, Train
from stackgrow.recipe.load import Problem

FLOAT8_CAPABILITY = (8, 9)  # torchtitan's own condition
# mallopt(3): numbers of glibc's parameters, and values for a training step on a CPU.
M_TRIM_THRESHOLD, KEPT_BYTES = -1, 2**31 - 1  # an int's largest
M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES = -3, 32 * 2**20  # glibc takes no larger one


class CpuDevice:
    """``torch.cpu`` plus the device-module functions that torchtitan calls; memory figures are the process's own."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        # torch.cpu answers "cpu", which barrier(device_ids=[...]) refuses.
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return platform.processor() or platform.machine()

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        )

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """The operating system's peak cannot be reset."""

    def empty_cache(self) -> None:
        """CPU memory is not cached."""


def install() -> None:
    """Gives torchtitan the CPU device when torch sees no accelerator. Call before torchtitan is imported."""
    if torch._utils._get_available_device_type() is not None:
        return
    torchs_device_type = torch._utils._get_available_device_type
    torchs_device_module = torch._utils._get_device_module
    cpu = CpuDevice()
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda name: (
        cpu if name == "cpu" else torchs_device_module(name)
    )
    try:
        import torchtitan.tools.utils  # noqa: F401  (reads both functions once, here)
    finally:
        torch._utils._get_available_device_type = torchs_device_type
        torch._utils._get_device_module = torchs_device_module


def keep_freed_memory() -> None:
    """Has glibc keep the memory that one training step frees for the next one; for a CPU.

    Left to itself it hands large blocks back to the kernel, and each step pays anew for their pages. Nothing that is
    computed changes. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def problems(plan: Plan) -> Iterator[Problem]:
    """What the recipe asks for and this machine's devices cannot do; needs no process group."""
    if plan.recipe.log.wandb and not importlib.util.find_spec("wandb"):
        yield (
            "log.wandb",
            "true needs the package wandb: pip install 'stackgrow[wandb]', or set false",
        )
    trains = [stage.train for stage in plan.train_stages]
    if any(train.precision == "float8" for train in trains):
        yield from _float8_problems()
    if torch.cuda.is_available():
        yield from _gpu_problems(trains)
    else:
        yield from _cpu_problems(trains, plan.recipe)


def _gpu_problems(trains: list[Train]) -> Iterator[Problem]:
    gpus = torch.cuda.device_count()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_ranks > gpus:
        yield "parallel", f"{local_ranks} ranks on this machine, which has {gpus} GPUs"
    wants_flash = any(train.attention == "flash_attn" for train in trains)
    if wants_flash and not importlib.util.find_spec("flash_attn"):
        rule = "needs the package flash-attn: pip install 'stackgrow[flash]', or use \"sdpa\""
        yield "train.attention", f'"flash_attn" {rule}'


def _cpu_problems(trains: list[Train], recipe: Recipe) -> Iterator[Problem]:
    kernels = {train.attention for train in trains}
    for kernel in sorted(kernels - {"sdpa"}):
        yield "train.attention", f'"{kernel}" needs a GPU; there is none: use "sdpa"'
    if any(train.cpu_offload for train in trains):
        yield (
            "train.cpu_offload",
            "true needs a GPU; there is none, and the weights are in host memory already",
        )
    if recipe.checkpoint.async_mode == "async_with_pinned_mem":
        yield (
            "checkpoint.async_mode",
            '"async_with_pinned_mem" needs a GPU; use "async" or "disabled"',
        )
    if any(train.compile for train in trains) and not shutil.which("g++"):
        yield (
            "train.compile",
            "true needs the compiler g++ on a machine without a GPU; install it or set false",
        )


def _float8_problems() -> Iterator[Problem]:
    if importlib.util.find_spec("torchao") is None:
        yield (
            "train.precision",
            '"float8" needs the package torchao: pip install stackgrow[float8]',
        )
    if (
        not torch.cuda.is_available()
        or torch.cuda.get_device_capability() < FLOAT8_CAPABILITY
    ):
        yield (
            "train.precision",
            '"float8" needs a GPU of compute capability 8.9 or newer (H100, L40); use "bf16"',
        )


def default_environment() -> None:
    """Lets plain ``python`` run as a single process: sets what torchrun would have set."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
