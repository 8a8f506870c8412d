"""Layouts, micro-batches and recomputation that fit a stage into a cluster's memory, ranked by a model of what
recomputation and communication add. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from stackgrow.plan.cost import Cluster, model_flops
from stackgrow.plan.memory import FP32, Layout, Memory, layout, stage_memory
from stackgrow.plan.stages import Plan, TrainStage

NETWORK = 50e9  # bytes per second and GPU between nodes, assumed: 400 Gb/s
NODE = 8  # GPUs that share NVLink
MODES = ("none", "selective", "full")
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Choice:
    """One way to run a stage. ``slowdown``: its time relative to the products alone, were those at the stated MFU."""

    layout: Layout
    micro_batch: int
    activation_checkpoint: str
    memory: Memory
    slowdown: float
    own: bool = False  # the recipe's
    place: int = 0  # among all that fit, from 1


def search(
    stage: TrainStage, cluster: Cluster, network: float = NETWORK, best: int = 3
) -> list[Choice]:
    """The fastest ways to run a stage that fit the memory, and after them the recipe's own if it is none of them and
    fits; ``network``: bytes per second and GPU between nodes."""
    own = _own_choice(stage, cluster, network)
    candidates = list(_choices(stage, cluster, network))
    if own is not None:
        candidates = [
            choice for choice in candidates if replace(choice, own=True) != own
        ]
        candidates.append(own)
    fitting = [
        choice for choice in candidates if choice.memory.total <= cluster.gpu.memory
    ]
    fitting.sort(key=lambda choice: (round(choice.slowdown, 3), choice.memory.total))
    placed = [
        replace(choice, place=place) for place, choice in enumerate(fitting, start=1)
    ]
    return [choice for choice in placed if choice.place <= best or choice.own]


def settings(plan: Plan, best: Mapping[str, Choice]) -> list[str]:
    """The assignments, each for one ``--set``, by which every stage runs as ``best`` has it for its name. A stage that
    learns maps is left out: its layout is that of the stage before it."""
    assignments = []
    for stage in plan.train_stages:
        if stage.learns_maps or stage.name not in best:
            continue
        choice = best[stage.name]
        table = ""
        if plan.recipe.growth:
            growth = sum(one.index < stage.index for one in plan.growths) - 1
            table = "base." if growth < 0 else f"growth[{growth}]."
        values = {
            "parallel.replicate": choice.layout.replicate,
            "parallel.shard": choice.layout.shard,
            "parallel.tensor": choice.layout.tensor,
            "train.micro_batch": choice.micro_batch,
            "train.activation_checkpoint": choice.activation_checkpoint,
        }
        for key, value in values.items():
            assignments.append(f"{table}{key}={value}")
    return assignments


def _own_choice(stage: TrainStage, cluster: Cluster, network: float) -> Choice | None:
    """What [parallel] and [train] say; None where that does not make so many ranks."""
    own_layout = layout(stage.parallel, cluster.gpus)
    ranks = own_layout.data_ranks * own_layout.tensor
    sequences = math.gcd(*stage.batches.sizes) // stage.seq_len  # of every step
    if ranks != cluster.gpus or sequences % own_layout.data_ranks:
        return None
    micro_batch = stage.micro_batch(own_layout.data_ranks)
    return Choice(
        layout=own_layout,
        micro_batch=micro_batch,
        activation_checkpoint=stage.train.activation_checkpoint,
        memory=stage_memory(stage, own_layout, micro_batch),
        slowdown=slowdown(stage, own_layout, micro_batch, cluster, network),
        own=True,
    )


def _choices(stage: TrainStage, cluster: Cluster, network: float) -> Iterator[Choice]:
    modes = MODES[:1] if stage.learns_maps else MODES
    sequences = math.gcd(*stage.batches.sizes) // stage.seq_len  # of every step
    for possible in _layouts(stage, cluster.gpus):
        share, rest = divmod(sequences, possible.data_ranks)
        if rest or not share:
            continue
        for micro_batch in MICRO_BATCHES:
            if share % micro_batch:
                continue
            for mode in modes:
                variant = replace(
                    stage, train=replace(stage.train, activation_checkpoint=mode)
                )
                memory = stage_memory(variant, possible, micro_batch)
                slow = slowdown(variant, possible, micro_batch, cluster, network)
                yield Choice(possible, micro_batch, mode, memory, slow)


def _layouts(stage: TrainStage, gpus: int) -> Iterator[Layout]:
    """FSDP, HSDP by nodes, and either with tensor parallelism inside a node, where the model divides."""
    model = stage.model
    must_divide = (
        model.n_heads,
        model.kv_heads,
        model.ffn_dim,
        model.vocab_size,
        stage.seq_len // 2,
    )
    no_tensor_parallel = (
        stage.learns_maps or stage.train.loss_chunk > 0
    )  # as checks.py has it
    for tensor in (1, 2, 4, 8):
        if gpus % tensor or any(size % tensor for size in must_divide):
            continue
        if tensor > 1 and no_tensor_parallel:
            continue
        for replicate in sorted({1, max(1, gpus // NODE)}):
            shard = gpus // tensor // replicate
            if shard * tensor * replicate == gpus and (shard > 1 or gpus == 1):
                yield Layout(replicate, shard, tensor, loss_parallel=True)


def slowdown(
    stage: TrainStage,
    layout: Layout,
    micro_batch: int,
    cluster: Cluster,
    network: float,
) -> float:
    """Seconds of one micro-batch on one rank over those of its products. FSDP's traffic (weights gathered twice,
    float32 gradients scattered once) overlaps with the products; tensor parallelism's (four gathers and four scatters
    of a layer's bf16 stream) does not."""
    gpu = cluster.gpu
    tokens = micro_batch * stage.seq_len
    weights = stage.model.parameters() / layout.tensor
    products = (
        model_flops(stage)
        / stage.tokens
        * tokens
        / layout.tensor
        / (gpu.flops * cluster.mfu)
    )

    wire = gpu.nvlink if layout.shard * layout.tensor <= NODE else network
    fsdp = weights * (2 + 2 + FP32) * (1 - 1 / layout.shard) / wire
    if layout.replicate > 1:  # the gradients of shards are summed over the nodes
        fsdp += 2 * FP32 * weights / layout.shard / network
    streams = 8 * stage.model.n_layers * tokens * stage.model.dim
    tensor_parallel = streams * 2 * (1 - 1 / layout.tensor) / gpu.nvlink

    overlapped = max(products * (1 + recomputed(stage)), fsdp)
    return (overlapped + tensor_parallel) / products


def recomputed(stage: TrainStage) -> float:
    """What is multiplied again, over all products: the layers' forward ones, or with "selective" every second."""
    model = stage.model
    D, Q, K, F = (
        model.dim,
        model.query_width,
        model.kv_heads * model.head_dim,
        model.ffn_dim,
    )
    again = {
        "none": 0,
        "selective": D * (K + Q + F),  # wk, wo, w3
        "full": D * (2 * K + 2 * Q + 3 * F),
    }
    products = (
        2 * model.n_layers * again[stage.train.activation_checkpoint]
    )  # of one token
    return products / stage.flops_per_token
