"""The process group that all stages of one session share."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torchtitan.distributed import utils as dist_utils

from stackgrow.recipe import Recipe
from stackgrow.titan import device
from stackgrow.titan.job import comm

GPU_TRACE_BUFFER = 20000  # torchtitan's default size of NCCL's flight recorder; gloo has none


def start(recipe: Recipe, logs: Path) -> None:
    """Joins the process group; plain ``python`` becomes a group of one."""
    device.default_environment()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist_utils.init_distributed(comm(recipe, GPU_TRACE_BUFFER if gpu else 0), base_folder=str(logs))


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
