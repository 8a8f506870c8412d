"""The head and the loss in one, some tokens at a time, so that the logits of a micro-batch are never all in memory.

16 sequences of 2048 tokens have 32768 x 32000 logits: 2.1 GB in bf16, and three times 4.2 GB while their loss and its
gradient are computed in float32. Here a chunk's gradient is taken as soon as its loss is there, in the forward pass,
so that nothing is computed twice.

torch has the same from 2.13 on, ``F.linear_cross_entropy`` with options. It is not used: in bf16 it is less exact, and
torch 2.11, which is supported, has not got it. Measured on a CPU with torch 2.13.0 against float64, relative errors of
the loss and (norm of the difference over norm) of the gradients of hidden states and weight; most memory beside inputs
and weight:

    float32, 4096 x 256 x 32000, chunk 512      loss     hidden   weight   MB
    all logits at once                          3.6e-8   3.4e-7   2.6e-7   1512
    here                                        1.4e-7   3.4e-7   2.5e-7    329
    torch's, "auto"                             3.6e-8   3.3e-7   8.7e-8    112    ("accurate": 144)

    bf16, 1024 x 64 x 8000, chunk 128           loss     hidden   weight   MB
    all logits at once                          2.1e-6   1.7e-3   1.7e-3    100
    here                                        2.1e-6   1.7e-3   1.5e-3     40
    torch's, "auto"                             4.4e-3   1.7e-3   3.5e-3     24    ("compact": 12)

In bf16 its loss is a bf16 number, which the third digit of a curve is lost in: so it is in 2.14.1 and 2.15.0 (the bf16
rows again on 2026-11-29, other numbers drawn: loss 2.5e-3, weight 3.4e-3 in all three). In float32 it is as exact and
needs a third of the memory: worth another look when its loss is float32 for bf16 inputs and 2.13 is the oldest torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.loss import build_cross_entropy_loss, cross_entropy_loss
from torchtitan.config import JobConfig

Loss = Callable[
    [Tensor, Tensor], Tensor
]  # logits [1, T, V], labels [1, T] -> their summed loss


class ChunkedHead(nn.Linear):
    """The output layer [V, D]; given labels, it returns their summed loss in the place of logits."""

    chunk: int  # tokens
    loss: Loss

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(hidden)
        return _ChunkedLoss.apply(
            hidden.flatten(0, 1),
            labels.flatten(),
            self.weight,
            self.chunk,
            self.loss,
            torch.is_grad_enabled(),
        )


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        chunk: int,
        loss: Loss,
        train: bool,
    ) -> Tensor:
        """``hidden`` [N, D] and ``labels`` [N] -> the sum over N; products in the precision that autocast or FSDP asks
        for, the weight's gradient summed over chunks in float32."""
        device = hidden.device.type
        dtype = (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else hidden.dtype
        )
        cast_weight = weight.to(dtype)
        total = torch.zeros((), device=hidden.device)
        ctx.hidden = torch.empty_like(hidden) if train else None
        ctx.weight = torch.zeros_like(weight, dtype=torch.float32) if train else None
        ctx.dtype = weight.dtype
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows].to(dtype)
            value, gradient = _chunk_loss(part, labels[rows], cast_weight, loss, train)
            total += value
            if gradient is not None:
                ctx.hidden[rows] = gradient @ cast_weight
                ctx.weight += gradient.T @ part
                del gradient  # the next chunk needs its room
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden = ctx.hidden.mul_(upstream)
        weight = ctx.weight.mul_(upstream).to(ctx.dtype)
        ctx.hidden = None  # once: what was made in the forward pass is used up
        ctx.weight = None
        return hidden, None, weight, None, None, None


def _chunk_loss(
    hidden: Tensor, labels: Tensor, weight: Tensor, loss: Loss, train: bool
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of a chunk and its gradient by the logits, which are gone when this returns."""
    logits = (hidden @ weight.T).detach().requires_grad_(train)
    with torch.enable_grad():
        value = loss(logits[None], labels[None])
    if not train:
        return value.detach(), None
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


def chunk_head(head: nn.Linear, chunk: int) -> None:
    """Makes a model's output layer a ``ChunkedHead``; its weight and its name stay."""
    head.__class__ = ChunkedHead
    head.chunk = chunk
    head.loss = cross_entropy_loss


class TiedHead(nn.Linear):
    """An output layer without a weight of its own: it reads the embedding's [V, D], which stays one parameter with one
    name, whatever shards it."""

    embedding: nn.Embedding

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight


class TiedChunkedHead(TiedHead, ChunkedHead):
    """Both at once."""


def tie_head(head: nn.Linear, embedding: nn.Embedding) -> None:
    """Makes a model's output layer a ``TiedHead``."""
    del head.weight
    head.__class__ = TiedChunkedHead if isinstance(head, ChunkedHead) else TiedHead
    head.__dict__["embedding"] = embedding  # not a part of the head: no second name


def build_loss(job_config: JobConfig, **_: Any) -> Loss:
    """torchtitan's loss; one that the head has summed already, a scalar, is passed on."""
    loss = build_cross_entropy_loss(job_config)

    def loss_of(prediction: Tensor, labels: Tensor) -> Tensor:
        is_loss_already = prediction.dim() == 0
        return prediction if is_loss_already else loss(prediction, labels)

    return loss_of
