"""What a train stage holds in the memory of one GPU. No torch.

Parameters, gradients and optimizer state are exact, for rank 0, whose shards are the largest: FSDP2 splits the first
dimension into equal chunks, the last of them padded. Activations, the loss and what FSDP gathers are estimates: they
follow from the tensors that torch's CUDA kernels save for the backward pass, and, compiled, from those that Inductor
saves: it makes norms and products with SiLU again, and the loss from the logits without a float32 copy of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from stackgrow.plan.stages import TrainStage
from stackgrow.recipe.keys import Parallel

ROWWISE = (
    "attention.wo.weight",
    "feed_forward.w2.weight",
)  # tensor parallel splits their columns, and others' rows
FP32 = 4


@dataclass(frozen=True)
class Layout:
    """How the ranks share one model."""

    replicate: int
    shard: int
    tensor: int
    loss_parallel: bool = True

    @property
    def data_ranks(self) -> int:
        return self.replicate * self.shard

    def __str__(self) -> str:
        return f"replicate {self.replicate} x shard {self.shard} x tensor {self.tensor}"


def layout(parallel: Parallel, ranks: int) -> Layout:
    """The layout of ``[parallel]`` on a number of ranks that fits it."""
    shard = (
        parallel.shard
        if parallel.shard > 0
        else ranks // (parallel.replicate * parallel.tensor)
    )
    return Layout(parallel.replicate, shard, parallel.tensor, parallel.loss_parallel)


@dataclass(frozen=True)
class Memory:
    """Bytes on rank 0. ``working`` is the largest of its moments: the loss, the backward pass of a layer, and, where
    new parameters have a rate of their own, the update."""

    parameters: int
    gradients: int
    optimizer: int
    activations: (
        int  # kept from the forward pass to the backward pass, of one micro-batch
    )
    loss: int  # logits and their gradients
    working: int  # activations and the most that is held beside them: the loss, a layer's own, gathered weights
    host: int = (
        0  # of parameters, gradients and optimizer, what cpu_offload keeps off the GPU
    )

    @property
    def total(self) -> int:
        return (
            self.parameters + self.gradients + self.optimizer - self.host + self.working
        )


def stage_memory(
    stage: TrainStage, layout: Layout, micro_batch: int | None = None
) -> Memory:
    """The memory of a stage on ``layout``, with ``micro_batch`` sequences per forward pass (default: the recipe's)."""
    tensors = stage.checkpoint_tensors()
    elements = sum(
        local_elements(name, shape, layout) for name, shape in tensors.items()
    )
    gradient_elements = elements
    if (
        layout.tensor > 1 and layout.shard == 1
    ):  # without FSDP, DTensor leaves the embedding's gradient whole
        gradient_elements += (
            stage.model.vocab_size
            * stage.model.dim
            * (layout.tensor - 1)
            // layout.tensor
        )
    parameters = FP32 * elements
    gradients = FP32 * gradient_elements
    optimizer = 2 * FP32 * elements + FP32 * len(
        tensors
    )  # AdamW's two moments, and a count of steps for each tensor

    sequences = micro_batch or stage.micro_batch(layout.data_ranks)
    sizes = _Sizes(stage, layout, tokens=sequences * stage.seq_len)
    activations = (
        stage.model.n_layers * sizes.kept(stage.train.activation_checkpoint)
        + sizes.head()
    )
    beside = max(sizes.loss() + sizes.head_weights, sizes.backward())
    working = activations + sizes.cast + beside + FP32 * stage.made_parameters
    if stage.new_rate:  # a copy of the weights during the update, and which are new
        working = max(working, FP32 * elements) + elements
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        loss=sizes.loss(),
        working=working,
        host=parameters + gradients + optimizer if stage.train.cpu_offload else 0,
    )


def local_elements(name: str, shape: Iterable[int], layout: Layout) -> int:
    """Elements of a tensor on rank 0: split by tensor parallel, then by FSDP along its rows."""
    rows, *columns = shape
    if columns and name.endswith(ROWWISE):
        columns = [_ceil(columns[0], layout.tensor)]
    elif columns or name.endswith(".bias"):
        rows = _ceil(rows, layout.tensor)
    return _ceil(rows, layout.shard) * math.prod(columns)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


class _Sizes:
    """Bytes of the tensors of one layer and of the head. D width, Q and K widths of queries and keys, F FFN
    width, V vocabulary, T tokens of a micro-batch, t ranks of tensor parallel, which share what lies between its
    gathers and scatters."""

    def __init__(self, stage: TrainStage, layout: Layout, tokens: int):
        model = stage.model
        self.D = model.dim
        self.K = model.kv_heads * model.head_dim
        self.Q = model.query_width
        self.F = model.ffn_dim
        self.V = model.vocab_size
        self.T = tokens
        self.t = layout.tensor
        self.heads = model.n_heads
        self.normed = model.qk_norm
        self.tied = model.tie_embeddings
        self.mode = stage.train.activation_checkpoint
        self.compiled = stage.train.compile
        self.chunk = stage.train.loss_chunk
        self.loss_parallel = layout.loss_parallel and layout.tensor > 1

        bf16 = stage.train.precision != "fp32"  # compiled, float8 keeps less than bf16
        sharded = layout.shard > 1
        # FSDP gathers weights in the precision of the products; what autocast makes without it lives for the step.
        self.autocast = bf16 and not sharded
        self.wide = 2 if bf16 else FP32  # bytes of a number in the products
        self.stream = (
            FP32 if self.autocast else self.wide
        )  # bytes of one in the residual stream

        layer = (
            sum(math.prod(shape) for shape in model.layer_tensors().values()) // self.t
        )
        head = self.V * self.D // self.t
        self.layer_weights = self.wide * layer if sharded else 0  # gathered
        self.head_weights = self.wide * head if sharded else 0
        self.layer_scatter = (
            FP32 * layer if sharded else 0
        )  # gradients on their way to their shards
        self.head_scatter = FP32 * head if sharded else 0
        # Compiled and recomputed, a layer's casts are made again with what they are for.
        cast_layers = 1 if self.compiled and self.mode != "none" else model.n_layers
        self.cast = self.wide * (cast_layers * layer + head) if self.autocast else 0

    def kept(self, mode: str) -> int:
        """What one layer keeps for its backward pass under ``activation_checkpoint``."""
        D, Q, K, F, t = self.D, self.Q, self.K, self.F, self.t
        if mode == "full":
            return self.T * self.stream * D // t
        residual_streams = 1
        statistics = FP32 * self.heads // t  # of attention
        if mode == "none":
            statistics += 2 * FP32 // t  # of norms
        if (
            mode == "selective"
        ):  # wq, wv, w1 and w2, attention, and what tensor parallel scatters
            scattered = 2 * D if t > 1 else 0
            own = (Q + K + F + Q + scattered) // t
            if not self.compiled:
                own += D
        elif self.compiled:  # q, attention and its product, k, v; gate, up, their product; the norms' outputs
            own = (2 * Q + D + 2 * K + 3 * F) // t + 2 * D
        else:  # q, attention, k, v; gate, its SiLU, up, their product; autocast copies a norm's output for each product
            residual_streams = 2
            norms = 5 * D if self.autocast else 2 * D
            own = (2 * Q + 2 * K + 4 * F) // t + norms
        if self.normed and mode == "none":  # queries and keys before their norms
            own += (Q + K) // t
        return self.T * (
            residual_streams * self.stream * D // t + self.wide * own + statistics
        )

    def head(self) -> int:
        """The input and the output of the last norm."""
        return self.T * (self.stream * self.D // self.t + self.wide * self.D)

    def loss(self) -> int:
        """The float32 log-softmax of the logits and two gradients, compiled the logits and one; with loss parallel, one
        temporary more; of a chunk, with its logits, the gradients of what enters the head and of its weight."""
        if self.loss_parallel:
            return 4 * FP32 * self.T * self.V // self.t
        per_logit = 2 * self.wide if self.compiled else 3 * FP32
        if not self.chunk:
            return per_logit * self.T * self.V
        if not self.compiled:
            per_logit += self.wide
        logits = per_logit * min(self.chunk, self.T) * self.V
        gradients = self.T * self.wide * self.D + FP32 * self.V * self.D
        return logits + gradients

    def backward(self) -> int:
        """The most beside ``kept`` in the backward pass of the last layer: at its start, what is recomputed, gradients
        of activations, and the head's gradient on its way; at its end, the layer's own. The next one's weights are
        there with its own."""
        recomputed = (
            0 if self.mode == "none" else self.kept("none") - self.kept(self.mode)
        )
        products = 3 * self.F if self.mode == "full" else 3 * self.F // 2
        gradients = self.T * self.wide * (min(self.t, 2) * self.D + products // self.t)
        start = recomputed + gradients + self.head_scatter
        # A tied head's matrix stays gathered for the embedding, and so does its gradient.
        tied = 2 * self.head_weights if self.tied else 0
        end = (
            tied
            + self.layer_weights
            + self.layer_scatter
            + 2 * self.T * self.wide * self.D
        )
        return 2 * self.layer_weights + max(start, end)
