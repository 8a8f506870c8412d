"""One rank of a large run on one machine without its data, weights or GPUs: torchtitan's fake process group, torch's
fake tensors, and torch's memory tracker on one traced step.

The stage is built and parallelized as in training, so the bytes of parameters, gradients and optimizer state are those
of the shards. CPU builds of torch cannot dispatch to CUDA kernels, even fake ones; what those save for the backward
pass is put in their place: flash attention, and the fused RMSNorm. Not seen so: torch.compile, NCCL's and cuBLAS'
buffers, fragmentation, time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.components.optimizer import build_optimizers
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.models.llama3.infra import parallelize

from stackgrow.data.loader import WindowDataset
from stackgrow.plan.memory import Memory, layout, stage_memory
from stackgrow.plan.stages import Plan, TrainStage
from stackgrow.recipe.keys import Recipe
from stackgrow.titan import model
from stackgrow.titan.config import job_config
from stackgrow.titan.job import StageJob, StageJobConfig
from stackgrow.titan.shards import shard_of

# The trackers' categories of what lives from step to step, and of sums.
STATE = (
    "Sharded Param",
    "Sharded Grad",
    "OptState",
    "Parameter",
    "Gradient",
    "Optstate",
    "Total",
)
# What selective recomputation keeps on a CPU, where attention has a name that torchtitan does not know.
CPU_SAVED = {
    *parallelize._op_sac_save_list,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


@dataclass(frozen=True)
class Traced:
    """Bytes on rank 0, as in memory.Memory, and the seconds that tracing took."""

    parameters: int
    gradients: int
    optimizer: int
    kept: int  # beside these at the end of the forward pass: activations, log-softmax, gathered weights, inputs
    working: int  # beside these at the peak of the step
    seconds: float

    def state_equals(self, planned: Memory) -> bool:
        """Whether parameters, gradients and optimizer state are exactly as planned."""
        return (
            self.parameters == planned.parameters
            and self.gradients == planned.gradients
            and self.optimizer == planned.optimizer
        )


@contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """This process as rank 0 of ``ranks`` that are not there."""
    dist_utils.init_fake_mode(ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def eager(stage: TrainStage) -> TrainStage:
    """The stage as it is traced: as large, without what cannot be."""
    train = replace(stage.train, compile=False, cpu_offload=False, attention="sdpa")
    return replace(stage, train=train, document_mask=False)


def trace(recipe: Recipe, stage: TrainStage, *, real: bool = False) -> Traced:
    """One step of a train stage on rank 0 of the process group's (fake) ranks; ``real`` computes it, on this CPU."""
    started = time.monotonic()
    dims = _parallel_dims(stage)
    no_data = WindowDataset.__new__(WindowDataset)
    job = StageJob(
        recipe=recipe, stage=eager(stage), stage_hash="", folder=Path(), data=no_data
    )
    config = job_config(job)
    network = _build(recipe, stage, dims, config, real)
    with nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu")
        if real:
            with torch.no_grad():
                network.init_weights()
        if dims.world_size == 1:
            # As when gradients accumulate: at the peak all are there; shards of them hardly count.
            for weight in network.parameters():
                weight.grad = torch.zeros_like(weight)
        optimizers = build_optimizers([network], config.optimizer, dims)
        step = _Step(
            network=network,
            optimizers=optimizers,
            batch=torch.zeros(2, job.micro_batch, stage.seq_len, dtype=torch.int64),
            train_context=dist_utils.get_train_context(
                dims.tp_enabled and stage.parallel.loss_parallel
            ),
            amp=dist_utils.maybe_enable_amp(
                dims, config.training.mixed_precision_param, "cpu"
            ),
            head_computes_loss=bool(stage.train.loss_chunk),
        )
        kept, working = step.traced()

    weights = list(network.parameters())
    states: list[Tensor] = []
    for state in optimizers.optimizers[0].state.values():
        states.extend(state.values())
    return Traced(
        parameters=_local_bytes(weights),
        gradients=_local_bytes([weight.grad for weight in weights]),
        optimizer=_local_bytes(states),
        kept=kept,
        working=working,
        seconds=time.monotonic() - started,
    )


def _parallel_dims(stage: TrainStage) -> ParallelDims:
    ranks = dist.get_world_size()
    degrees = layout(stage.parallel, ranks)
    dims = ParallelDims(
        dp_replicate=degrees.replicate,
        dp_shard=degrees.shard,
        cp=1,
        tp=degrees.tensor,
        pp=1,
        ep=1,
        etp=1,
        world_size=ranks,
    )
    dims.build_mesh()
    return dims


def _build(
    recipe: Recipe,
    stage: TrainStage,
    dims: ParallelDims,
    config: StageJobConfig,
    real: bool,
) -> nn.Module:
    """The stage's model, parallelized, on the meta device."""
    args = model.model_args(
        stage.model, recipe.seed, mask=stage.mask, loss_chunk=stage.train.loss_chunk
    )
    args.update_from_config(config)
    with mock.patch.object(parallelize, "_op_sac_save_list", CPU_SAVED):
        with torch.device("meta"):
            network = model.Llama(args)
        if not real:
            _use_cuda_kernels(network)
        return model.parallelize(network, dims, config)


def _local_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(shard_of(tensor).local.nbytes for tensor in tensors)


@dataclass
class _Step:
    """One optimizer step of a single micro-batch; ``batch`` [2, B, T] holds tokens and labels."""

    network: nn.Module
    optimizers: Any
    batch: Tensor
    train_context: Any
    amp: Any
    head_computes_loss: bool

    def traced(self) -> tuple[int, int]:
        """Bytes beside the state after the forward pass, and at the peak."""
        tokens, labels = self.batch.unbind()
        tracker = self._tracker(tokens, labels)
        with tracker, _no_propagation(tracker):
            with self.train_context():
                with self.amp:
                    loss = self._loss(tokens, labels)
                kept = tracker.get_tracker_snapshot("current")
                loss.backward()
            peak = tracker.get_tracker_snapshot("peak")
            self.optimizers.step()
        return _beside_state(kept), _beside_state(peak)

    def _tracker(self, *inputs: Tensor) -> MemTracker:
        optimizer = self.optimizers.optimizers[0]
        if isinstance(self.network, FSDPModule):
            fsdp_tracker = FSDPMemTracker(self.network, optimizer)
            fsdp_tracker.track_inputs(inputs)
            return fsdp_tracker
        tracker = MemTracker()
        tracker.track_external(self.network, optimizer, *inputs)
        return tracker

    def _loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The logits are freed when this returns, as in training."""
        if self.head_computes_loss:
            return self.network(tokens, labels=labels)
        return cross_entropy_loss(self.network(tokens), labels)


def _beside_state(snapshot: dict[torch.device, dict[str, int]]) -> int:
    total = 0
    for categories in snapshot.values():
        for category, size in categories.items():
            name = str(getattr(category, "value", category))
            if name not in STATE:
                total += size
    return total


@contextmanager
def _no_propagation(tracker: MemTracker) -> Iterator[None]:
    """DTensor finds out the shapes of results on whole fake tensors, which a real rank never holds: not tracked."""
    original = ShardingPropagator._propagate_tensor_meta_non_cached

    def untracked(self: Any, *args: Any) -> Any:
        mode = tracker._fake_mode_on_entry
        tracker._fake_mode_on_entry = object()
        try:
            return original(self, *args)
        finally:
            tracker._fake_mode_on_entry = mode

    with mock.patch.object(
        ShardingPropagator, "_propagate_tensor_meta_non_cached", untracked
    ):
        yield


class _FlashAttention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]


class _SavedByFusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(
            x, weight, torch.empty_like(x[..., :1], dtype=torch.float32)
        )
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _FusedNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return _SavedByFusedNorm.apply(x, self.weight)


def _use_cuda_kernels(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.RMSNorm):
            module.__class__ = _FusedNorm
        elif hasattr(module, "inner_attention"):
            module.inner_attention = _FlashAttention()


@dataclass(frozen=True)
class Compared:
    stage: TrainStage
    traced: Traced
    planned: Memory


def compare(plan: Plan, ranks: int) -> Iterator[Compared]:
    """Every train stage as traced and as planned, both not compiled. Learn stages are left out: their weights
    come from a checkpoint."""
    with fake_ranks(ranks):
        for stage in plan.train_stages:
            if not stage.learns_maps:
                planned = stage_memory(eager(stage), layout(stage.parallel, ranks))
                yield Compared(stage, trace(plan.recipe, stage), planned)
