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
from stackgrow.titan.job import StageJob, job_config
from stackgrow.titan.shards import shard_of

# The trackers' categories of what lives from step to step, and of sums.
STATE = ("Sharded Param", "Sharded Grad", "OptState", "Parameter", "Gradient", "Optstate", "Total")
# What selective recomputation keeps on a CPU, where attention has a name that torchtitan does not know.
CPU_SAVED = {*parallelize._op_sac_save_list, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}


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
        ours = (self.parameters, self.gradients, self.optimizer)
        return ours == (planned.parameters, planned.gradients, planned.optimizer)


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
    started, ranks = time.monotonic(), dist.get_world_size()
    how = layout(stage.parallel, ranks)
    dims = ParallelDims(how.replicate, how.shard, cp=1, tp=how.tensor, pp=1, ep=1, etp=1, world_size=ranks)
    dims.build_mesh()
    job = StageJob(recipe, eager(stage), "", Path(), WindowDataset.__new__(WindowDataset))
    config = job_config(job)
    args = model.model_args(stage.model, recipe.seed, stage.mask, loss_chunk=stage.train.loss_chunk)
    args.update_from_config(config)
    with mock.patch.object(parallelize, "_op_sac_save_list", CPU_SAVED):
        with torch.device("meta"):
            built = model.Llama(args)
        if not real:
            _use_cuda_kernels(built)
        network = model.parallelize(built, dims, config)
    with nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu")
        if real:
            with torch.no_grad():
                network.init_weights()
        if ranks == 1:  # as when gradients accumulate: at the peak all are there; shards of them hardly count
            for weight in network.parameters():
                weight.grad = torch.zeros_like(weight)
        optimizers = build_optimizers([network], config.optimizer, dims)
        loss_parallel = how.tensor > 1 and how.loss_parallel
        amp = dist_utils.maybe_enable_amp(dims, config.training.mixed_precision_param, "cpu")
        inputs = torch.zeros(2, job.micro_batch, stage.seq_len, dtype=torch.int64).unbind()
        contexts = (dist_utils.get_train_context(loss_parallel), amp)
        kept, peak = _step(network, optimizers, inputs, contexts, chunked=bool(stage.train.loss_chunk))
    weights = list(network.parameters())
    states = [value for state in optimizers.optimizers[0].state.values() for value in state.values()]
    state = (_local_bytes(weights), _local_bytes([w.grad for w in weights]), _local_bytes(states))
    return Traced(*state, kept, peak, time.monotonic() - started)


def _local_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(shard_of(tensor).local.nbytes for tensor in tensors)


def _step(
    network: nn.Module, optimizers: Any, inputs: tuple[Tensor, ...], contexts: tuple[Any, Any], chunked: bool
) -> tuple[int, int]:
    """Forward and backward pass and update; bytes beside the state after the forward pass, and at the peak."""
    optimizer, (train_context, amp) = optimizers.optimizers[0], contexts
    if isinstance(network, FSDPModule):
        tracker = FSDPMemTracker(network, optimizer)
        tracker.track_inputs(inputs)
    else:
        tracker = MemTracker()
        tracker.track_external(network, optimizer, *inputs)
    tokens, labels = inputs
    with tracker, _no_propagation(tracker):
        with train_context():
            with amp:
                predicted = network(tokens, labels=labels) if chunked else network(tokens)
                loss = predicted if chunked else cross_entropy_loss(predicted, labels)
            del predicted
            kept = tracker.get_tracker_snapshot("current")
            loss.backward()
        peak = tracker.get_tracker_snapshot("peak")
        optimizers.step()
    return _beside_state(kept), _beside_state(peak)


def _beside_state(snapshot: dict[torch.device, dict[str, int]]) -> int:
    categories = [item for device in snapshot.values() for item in device.items()]
    return sum(size for name, size in categories if str(getattr(name, "value", name)) not in STATE)


@contextmanager
def _no_propagation(tracker: MemTracker) -> Iterator[None]:
    """DTensor finds out the shapes of results on whole fake tensors, which a real rank never holds: not tracked."""
    original = ShardingPropagator._propagate_tensor_meta_non_cached

    def untracked(self: Any, *args: Any) -> Any:
        mode, tracker._fake_mode_on_entry = tracker._fake_mode_on_entry, object()
        try:
            return original(self, *args)
        finally:
            tracker._fake_mode_on_entry = mode

    with mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", untracked):
        yield


class _FlashAttention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]


class _SavedByFusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty_like(x[..., :1], dtype=torch.float32))
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


def compare(plan: Plan, ranks: int) -> Iterator[tuple[TrainStage, Traced, Memory]]:
    """Every train stage as traced and as planned, both not compiled. Learn stages are left out: their weights
    come from a checkpoint."""
    with fake_ranks(ranks):
        for stage in plan.train_stages:
            if not stage.learns_maps:
                planned = stage_memory(eager(stage), layout(stage.parallel, ranks))
                yield stage, trace(plan.recipe, stage), planned
