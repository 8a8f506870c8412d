"""What a plan costs on a cluster: memory, time, disk, data, and what it saves. No torch.

Exact: parameters, tokens, steps, FLOPs, checkpoints, and the bytes of parameters, gradients and optimizer state on
rank 0. Estimated: activations (memory.py), and time, which is FLOPs over peak at a stated model FLOPs utilization
(MFU; 6 N D and attention's products, as torchtitan counts it) without validations, checkpoints and restarts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stackgrow.data.store import StoreError, read_manifest
from stackgrow.plan.checks import world_problems
from stackgrow.plan.memory import FP32, Layout, Memory, layout, stage_memory
from stackgrow.plan.saving import Saving, expected_saving
from stackgrow.plan.stages import CHECKPOINT_BYTES, GrowStage, Plan, Stage, TrainStage

MFU = 0.4  # assumed where the caller does not state it


@dataclass(frozen=True)
class Gpu:
    """``memory``: the datasheet's GB, read as 10^9 bytes: what devices have above that, CUDA and NCCL take."""

    memory: float
    flops: float  # dense bf16, per second
    nvlink: float  # bytes per second in one direction
    source: str


GPUS = {
    "a100": Gpu(80e9, 312e12, 300e9, "NVIDIA A100 80GB SXM datasheet"),
    "h100": Gpu(
        80e9, 989e12, 450e9, "NVIDIA H100 SXM datasheet: 1,979 TFLOP/s with sparsity"
    ),
    "h200": Gpu(
        141e9, 989e12, 450e9, "NVIDIA H200 SXM datasheet: 1,979 TFLOP/s with sparsity"
    ),
    "b200": Gpu(
        180e9,
        2250e12,
        900e9,
        "NVIDIA DGX B200 datasheet: 1,440 GB in 8 GPUs, 36 PFLOP/s with sparsity",
    ),
}


@dataclass(frozen=True)
class Cluster:
    gpus: int
    kind: str
    mfu: float = MFU

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.kind]

    def hours(self, flops: float) -> float:
        """Wall-clock hours of all GPUs."""
        return flops / (self.gpus * self.gpu.flops * self.mfu) / 3600


@dataclass(frozen=True)
class StageCost:
    """One train stage on the cluster; ``memory`` in bytes on rank 0, of all GPUs' ``hours``."""

    stage: TrainStage
    layout: Layout
    micro_batch: int
    accumulation: int
    memory: Memory
    hours: float


@dataclass(frozen=True)
class Cost:
    plan: Plan
    cluster: Cluster
    stages: tuple[StageCost, ...]
    disk: int  # bytes, when all is done
    peak_disk: int
    epochs: dict[str, float]  # of each store whose size is known, by its path
    saving: Saving | None
    problems: tuple[str, ...]  # what does not fit

    @property
    def hours(self) -> float:
        return self.cluster.hours(sum(map(model_flops, self.plan.train_stages)))


def model_flops(stage: TrainStage) -> float:
    """6 N D and attention's products."""
    return stage.flops + stage.attention_flops


def estimate(plan: Plan, cluster: Cluster, data_tokens: int | None = None) -> Cost:
    """The cost of a plan; ``data_tokens``: of one epoch of stores that are not here."""
    problems = [
        f"{where}: {what}" for where, what in world_problems(plan, cluster.gpus)
    ]
    stages: list[StageCost] = []
    if not problems:
        stages = [_stage_cost(stage, cluster) for stage in plan.train_stages]
    for cost in stages:
        if cost.memory.total > cluster.gpu.memory:
            problems.append(_too_large(cost, cluster))
    return Cost(
        plan=plan,
        cluster=cluster,
        stages=tuple(stages),
        disk=sum(stage_disk(plan, stage)[0] for stage in plan.stages),
        peak_disk=_peak_disk(plan),
        epochs=_epochs(plan, data_tokens),
        saving=expected_saving(plan),
        problems=tuple(problems),
    )


def _stage_cost(stage: TrainStage, cluster: Cluster) -> StageCost:
    stage_layout = layout(stage.parallel, cluster.gpus)
    micro_batch = stage.micro_batch(stage_layout.data_ranks)
    return StageCost(
        stage=stage,
        layout=stage_layout,
        micro_batch=micro_batch,
        accumulation=stage.batch_sequences // stage_layout.data_ranks // micro_batch,
        memory=stage_memory(stage, stage_layout),
        hours=cluster.hours(model_flops(stage)),
    )


def _too_large(cost: StageCost, cluster: Cluster) -> str:
    need, have = cost.memory.total / 1e9, cluster.gpu.memory / 1e9
    return (
        f"{cost.stage.name}: {need:.1f} GB on one {cluster.kind} of {have:.0f} GB; lower micro_batch, recompute "
        "activations, or use more tensor parallelism: --search looks for what fits"
    )


def stage_disk(plan: Plan, stage: Stage) -> tuple[int, int]:
    """Bytes that a stage leaves on disk, and the most while it runs: a checkpoint is whole before one is dropped."""
    if isinstance(stage, GrowStage):
        size = 0
        if not stage.links:
            per_parameter = CHECKPOINT_BYTES if stage.optimizer else FP32
            size = per_parameter * stage.target.parameters()
        return size, size
    intervals = stage.steps / stage.every(plan.recipe.checkpoint.interval)
    written = max(1, math.ceil(intervals))  # the last always
    kept = min(plan.recipe.checkpoint.keep, written)
    most = min(kept + 1, written)
    return kept * stage.checkpoint_bytes, most * stage.checkpoint_bytes


def _peak_disk(plan: Plan) -> int:
    """The most bytes of all stages so far at one moment of the run."""
    peak = left_by_earlier = 0
    for stage in plan.stages:
        kept, most = stage_disk(plan, stage)
        peak = max(peak, left_by_earlier + most)
        left_by_earlier += kept
    return peak


def _epochs(plan: Plan, data_tokens: int | None) -> dict[str, float]:
    """How often the run goes over each store whose size is known, by its path."""
    stores = plan.recipe.data.stores
    total_weight = sum(weight for _, weight in stores)
    epochs = {}
    for path, weight in stores:
        try:
            size = read_manifest(path).splits["train"].tokens
        except StoreError:
            size = data_tokens or 0
        if size:
            epochs[path] = plan.tokens * weight / total_weight / size
    return epochs
