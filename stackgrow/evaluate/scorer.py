"""Log-likelihoods of rows of tokens under a stage's model, its data-parallel ranks sharing the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from stackgrow.titan.trainer import StageTrainer


@torch.no_grad()
def score(trainer: StageTrainer, rows: Sequence[tuple[list[int], int]], batch: int) -> list[tuple[float, bool]]:
    """For every row (token ids, n): the log-likelihood of its last n tokens given those before, and whether each of
    them is the likeliest. Collective: every rank gives the same rows and gets all results.

    Rows go by length, ``batch`` to a rank; in every round each rank makes one forward pass, with nothing in it for
    those that the rows do not suffice for.
    """
    dims, device = trainer.parallel_dims, trainer.device
    mesh = dims.get_mesh("batch") if dims.dp_enabled else None
    ranks, rank = (mesh.size(), mesh.get_local_rank()) if mesh else (1, 0)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]), reverse=True)
    results = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)
    with trainer.evaluating():
        for start in range(0, len(rows), ranks * batch):
            mine = order[start + rank * batch : min(start + (rank + 1) * batch, start + ranks * batch)]
            logits = _logits(trainer, [rows[i][0][:-1] for i in mine], batch)
            for i, row_logits in zip(mine, logits, strict=False):
                results[i] = _scored(row_logits, *rows[i])
    if mesh:
        dist.all_reduce(results, group=mesh.get_group())
    return [(float(value), bool(greedy)) for value, greedy in results.tolist()]


def _logits(trainer: StageTrainer, inputs: Sequence[list[int]], batch: int) -> Tensor:
    """Logits [rows, positions, V] of rows of token ids, which are filled up on the right: no position sees that.

    A compiled model gets one shape, so that it is not compiled anew for each; tensor parallel splits the positions.
    """
    job = trainer.stage_job
    unit = job.stage.parallel.tensor
    length = -(-max([1, *map(len, inputs)]) // unit) * unit
    count = len(inputs) or 1
    if job.stage.train.compile:
        length, count = job.stage.seq_len, batch
    tokens = torch.zeros(count, length, dtype=torch.int64)
    for row, ids in zip(tokens, inputs, strict=False):
        row[: len(ids)] = torch.tensor(ids)
    with trainer.maybe_enable_amp:
        logits: Tensor = trainer.model_parts[0](tokens.to(trainer.device))
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


def _scored(logits: Tensor, ids: list[int], n: int) -> Tensor:
    """(log-likelihood, all likeliest) of the last ``n`` of ``ids``, from the row's logits [positions, V]."""
    scored = torch.log_softmax(logits[len(ids) - 1 - n : len(ids) - 1].float(), dim=-1)
    wanted = torch.tensor(ids[-n:], device=logits.device)
    likelihood = scored.gather(1, wanted[:, None]).sum(dtype=torch.float64)
    return torch.stack([likelihood, (scored.argmax(dim=-1) == wanted).all().double()])
