"""What a plan costs on a cluster: memory, time, disk, data, and what it saves. No torch.

Exact: parameters, tokens, steps, FLOPs, checkpoints, and the bytes of parameters, gradients and optimizer state on
rank 0. Estimated: activations (memory.py), and time, which is FLOPs over peak at a stated model FLOPs utilization
(MFU; 6 N D and attention's products, as torchtitan counts it) without validations, checkpoints and restarts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from stackgrow.data.store import StoreError, read_manifest
from stackgrow.growth.operators import operator_named
from stackgrow.plan.checks import world_problems
from stackgrow.plan.memory import FP32, Layout, Memory, layout, stage_memory
from stackgrow.plan.stages import CHECKPOINT_BYTES, GrowStage, Plan, TrainStage
from stackgrow.text import human

MFU = 0.4  # assumed where the caller does not state it
NETWORK = 50e9  # bytes per second and GPU between nodes, assumed: 400 Gb/s
NODE = 8  # GPUs that share NVLink
MODES = ("none", "selective", "full")


@dataclass(frozen=True)
class Gpu:
    """``memory``: the datasheet's GB, read as 10^9 bytes: what devices have above that, CUDA and NCCL take."""

    memory: float
    flops: float  # dense bf16, per second
    nvlink: float  # bytes per second in one direction
    source: str


GPUS = {
    "a100": Gpu(80e9, 312e12, 300e9, "NVIDIA A100 80GB SXM datasheet"),
    "h100": Gpu(80e9, 989e12, 450e9, "NVIDIA H100 SXM datasheet: 1,979 TFLOP/s with sparsity"),
    "h200": Gpu(141e9, 989e12, 450e9, "NVIDIA H200 SXM datasheet: 1,979 TFLOP/s with sparsity"),
    "b200": Gpu(180e9, 2250e12, 900e9, "NVIDIA DGX B200 datasheet: 1,440 GB in 8 GPUs, 36 PFLOP/s with sparsity"),
}

# Speed-ups that the paper measured for G_stack, g = 4, d = 10B: target, its parameters without embeddings, tokens of
# the scratch run, speed-up, where.
MEASURED = (
    ("410M", 308e6, 400e9, 0.531, "section 4.1, Figure 6"),
    ("410M", 308e6, 700e9, 0.310, "section 4.1, Figure 6"),
    ("1.1B", 1233e6, 100e9, 0.491, "section 3.2, Figure 3"),
    ("3B", 2234e6, 180e9, 0.486, "section 4.1, Figure 4"),
    ("3B", 2234e6, 240e9, 0.545, "section 4.1, Figure 4"),
    ("7B", 6476e6, 160e9, 0.408, "section 4.1, Figure 5"),
    ("7B", 6476e6, 220e9, 0.553, "section 4.1, Figure 5"),
    ("7B", 6476e6, 280e9, 0.538, "section 4.1, Figure 5"),
    ("7B", 6476e6, 300e9, 0.546, "section 1, Figure 1"),
)


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
class Saving:
    """What a scratch run to the same loss would cost more, if the nearest speed-up that was measured holds here."""

    target: str
    tokens: float
    speed_up: float
    source: str
    flops: float
    caveats: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    plan: Plan
    cluster: Cluster
    stages: tuple[StageCost, ...]
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
    misfits = [f"{where}: {what}" for where, what in world_problems(plan, cluster.gpus)]
    stages = () if misfits else tuple(_stage_cost(stage, cluster) for stage in plan.train_stages)
    misfits += [_too_large(s, cluster) for s in stages if s.memory.total > cluster.gpu.memory]
    disk, peak = 0, 0
    for stage in plan.stages:
        kept, most = stage_disk(plan, stage)
        peak, disk = max(peak, disk + most), disk + kept
    return Cost(plan, cluster, stages, peak, _epochs(plan, data_tokens), expected_saving(plan), tuple(misfits))


def _stage_cost(stage: TrainStage, cluster: Cluster) -> StageCost:
    how = layout(stage.parallel, cluster.gpus)
    micro_batch = stage.micro_batch(how.data_ranks)
    accumulation = stage.batch_sequences // how.data_ranks // micro_batch
    hours = cluster.hours(model_flops(stage))
    return StageCost(stage, how, micro_batch, accumulation, stage_memory(stage, how), hours)


def _too_large(cost: StageCost, cluster: Cluster) -> str:
    need, have = cost.memory.total / 1e9, cluster.gpu.memory / 1e9
    return (
        f"{cost.stage.name}: {need:.1f} GB on one {cluster.kind} of {have:.0f} GB; lower micro_batch, recompute "
        "activations, or use more tensor parallelism: --search looks for what fits"
    )


def stage_disk(plan: Plan, stage: TrainStage | GrowStage) -> tuple[int, int]:
    """Bytes that a stage leaves on disk, and the most while it runs: a checkpoint is whole before one is dropped."""
    if isinstance(stage, GrowStage):
        size = 0 if stage.links else (CHECKPOINT_BYTES if stage.optimizer else FP32) * stage.target.parameters()
        return size, size
    written = math.ceil(stage.steps / stage.every(plan.recipe.checkpoint.interval))
    kept = min(plan.recipe.checkpoint.keep, written)
    return kept * stage.checkpoint_bytes, min(kept + 1, written) * stage.checkpoint_bytes


def _epochs(plan: Plan, data_tokens: int | None) -> dict[str, float]:
    stores, found = plan.recipe.data.stores, {}
    for path, weight in stores:
        try:
            size = read_manifest(path).splits["train"].tokens
        except StoreError:
            size = data_tokens or 0
        if size:
            found[path] = plan.tokens * weight / sum(w for _, w in stores) / size
    return found


def expected_saving(plan: Plan) -> Saving | None:
    """By the measured speed-up whose target and scratch tokens are nearest, in logarithms; None without growth."""
    growths = plan.growths
    if not growths:
        return None
    last = plan.train_stages[-1]
    n = last.model.non_embedding_parameters()

    def scratch_tokens(speed_up: float) -> float:
        return plan.flops * (1 + speed_up) / last.flops_per_token

    def distance(row: tuple[str, float, float, float, str]) -> float:
        return abs(math.log(row[1] / n)) + abs(math.log(row[2] / scratch_tokens(row[3])))

    target, parameters, tokens, speed_up, source = min(MEASURED, key=distance)
    caveats = [f"{len(growths)} growths, measured with one"] if len(growths) > 1 else []
    if any(s.noise or not operator_named(s.operator).studied for s in growths):
        caveats.append("another operator than G_stack")
    if abs(math.log(n / parameters)) > math.log(1.2):
        caveats.append(f"{human(n)} parameters without embeddings, measured with {human(parameters)}")
    if abs(math.log(scratch_tokens(speed_up) / tokens)) > math.log(1.2):
        caveats.append(
            f"the scratch run would have {human(scratch_tokens(speed_up))} tokens, measured at {human(tokens)}"
        )
    return Saving(target, tokens, speed_up, source, speed_up * plan.flops, tuple(caveats))


@dataclass(frozen=True)
class Choice:
    """One way to run a stage. ``slowdown``: its time relative to the products alone, were those at the stated MFU."""

    layout: Layout
    micro_batch: int
    activation_checkpoint: str
    memory: Memory
    slowdown: float


def search(stage: TrainStage, cluster: Cluster, network: float = NETWORK, best: int = 3) -> list[Choice]:
    """The fastest ways to run a stage that fit the memory, by a model of what recomputation and communication add."""
    found = []
    sequences = math.gcd(*stage.batches.sizes) // stage.seq_len
    for how in _layouts(stage, cluster.gpus):
        share, rest = divmod(sequences, how.data_ranks)
        sizes = [m for m in (1, 2, 4, 8, 16, 32, 64) if rest == 0 and share and share % m == 0]
        for micro_batch, mode in itertools.product(sizes, MODES[:1] if stage.learns_maps else MODES):
            variant = replace(stage, train=replace(stage.train, activation_checkpoint=mode))
            memory = stage_memory(variant, how, micro_batch)
            if memory.total <= cluster.gpu.memory:
                slow = _slowdown(variant, how, micro_batch, cluster, network)
                found.append(Choice(how, micro_batch, mode, memory, slow))
    return sorted(found, key=lambda c: (round(c.slowdown, 3), c.memory.total))[:best]


def _layouts(stage: TrainStage, gpus: int) -> Iterator[Layout]:
    """FSDP, HSDP by nodes, and either with tensor parallelism inside a node, where the model divides."""
    model, whole = stage.model, stage.learns_maps or stage.train.loss_chunk > 0  # as checks.py has it
    divisible = (model.n_heads, model.kv_heads, model.ffn_dim, model.vocab_size, stage.seq_len // 2)
    for tensor in (1, 2, 4, 8):
        if gpus % tensor or any(size % tensor for size in divisible) or (tensor > 1 and whole):
            continue
        for replicate in sorted({1, max(1, gpus // NODE)}):
            shard = gpus // tensor // replicate
            if shard * tensor * replicate == gpus and (shard > 1 or gpus == 1):
                yield Layout(replicate, shard, tensor, loss_parallel=True)


def _slowdown(stage: TrainStage, how: Layout, micro_batch: int, cluster: Cluster, network: float) -> float:
    """Seconds of one micro-batch on one rank over those of its products. FSDP's traffic (weights gathered twice,
    float32 gradients scattered once) overlaps with the products; tensor parallelism's (four gathers and four scatters
    of a layer's bf16 stream) does not."""
    gpu, tokens, t, weights = cluster.gpu, micro_batch * stage.seq_len, how.tensor, stage.model.parameters()
    products = model_flops(stage) / stage.tokens * tokens / t / (gpu.flops * cluster.mfu)
    wire = gpu.nvlink if how.shard * t <= NODE else network
    fsdp = weights / t * (2 + 2 + FP32) * (1 - 1 / how.shard) / wire
    if how.replicate > 1:  # the gradients of shards are summed over the nodes
        fsdp += 2 * FP32 * weights / t / how.shard / network
    stream = 8 * stage.model.n_layers * tokens * stage.model.dim * 2 * (1 - 1 / t) / gpu.nvlink
    return (max(products * (1 + recomputed(stage)), fsdp) + stream) / products


def recomputed(stage: TrainStage) -> float:
    """What is multiplied again, over all products: the layers' forward ones, or with "selective" every second."""
    model, mode = stage.model, stage.train.activation_checkpoint
    D, K, F = model.dim, model.kv_heads * model.head_dim, model.ffn_dim
    again = {"none": 0, "selective": D * (K + D + F), "full": D * (2 * K + 2 * D + 3 * F)}[mode]  # wk, wo, w3 of all
    return 2 * model.n_layers * again / stage.flops_per_token
